"""Products of a few chosen pairs of vectors, without the matrix of all and without keeping what was chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_dot(anchors: Tensor, others: Tensor, indices: Tensor) -> Tensor:
    """[a, b, N, K]: <anchors[a, n], others[b, picked[a, b, n, k]]> for ``anchors`` [a, N, D], ``others`` [b, M, D].

    ``picked`` is int64 [a, b, N, K]. Differentiable once in both. The vectors are fetched one k at a time, and
    again in the backward pass: memory for a x b x N x D numbers, whatever K.
    """
    return _GatherDot.apply(anchors, others, indices)


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, others: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(anchors, others, indices)
        products = anchors.new_empty(indices.shape)
        for k, (rows, shape) in enumerate(_split_columns(others, indices)):
            fetched = others.flatten(0, 1).index_select(0, rows).view(*shape, -1)
            torch.sum(fetched.mul_(anchors[:, None]), -1, out=products[..., k])
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        anchors, others, indices = ctx.saved_tensors
        grad_anchors = torch.zeros_like(anchors) if ctx.needs_input_grad[0] else None
        grad_others = torch.zeros_like(others.flatten(0, 1)) if ctx.needs_input_grad[1] else None
        for k, (rows, shape) in enumerate(_split_columns(others, indices)):
            weight = gradients[0][..., k, None]
            if grad_anchors is not None:
                fetched = others.flatten(0, 1).index_select(0, rows).view(*shape, -1)
                grad_anchors += fetched.mul_(weight).sum(1)
            if grad_others is not None:
                grad_others.index_add_(0, rows, (anchors[:, None] * weight).flatten(0, 2))
        return grad_anchors, None if grad_others is None else grad_others.view_as(others), None


def _split_columns(others: Tensor, indices: Tensor) -> list[tuple[Tensor, torch.Size]]:
    """For each k the rows of ``others`` [b x M, D] that are wanted, [a x b x N], and the shape [a, b, N]."""
    b, m, _ = others.shape
    first = m * torch.arange(b, device=indices.device)[:, None]
    return [((column + first).flatten(), column.shape) for column in indices.unbind(-1)]
