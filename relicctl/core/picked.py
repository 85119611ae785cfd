"""Products of a few chosen pairs of vectors, without the matrix of all and without keeping what was chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def picked_products(anchors: Tensor, others: Tensor, picked: Tensor) -> Tensor:
    """[a, b, N, K]: <anchors[a, n], others[b, picked[a, b, n, k]]> for ``anchors`` [a, N, D], ``others`` [b, M, D].

    ``picked`` is int64 [a, b, N, K]. Differentiable once in both. The vectors are fetched one k at a time, and
    again in the backward pass: memory for a x b x N x D numbers, whatever K.
    """
    return _PickedProducts.apply(anchors, others, picked)


class _PickedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, others: Tensor, picked: Tensor) -> Tensor:
        ctx.save_for_backward(anchors, others, picked)
        products = anchors.new_empty(picked.shape)
        for k, (rows, shape) in enumerate(_columns(others, picked)):
            fetched = others.flatten(0, 1).index_select(0, rows).view(*shape, -1)
            torch.sum(fetched.mul_(anchors[:, None]), -1, out=products[..., k])
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        anchors, others, picked = ctx.saved_tensors
        of_anchors = torch.zeros_like(anchors) if ctx.needs_input_grad[0] else None
        of_others = torch.zeros_like(others.flatten(0, 1)) if ctx.needs_input_grad[1] else None
        for k, (rows, shape) in enumerate(_columns(others, picked)):
            weight = gradients[0][..., k, None]
            if of_anchors is not None:
                fetched = others.flatten(0, 1).index_select(0, rows).view(*shape, -1)
                of_anchors += fetched.mul_(weight).sum(1)
            if of_others is not None:
                of_others.index_add_(0, rows, (anchors[:, None] * weight).flatten(0, 2))
        return of_anchors, None if of_others is None else of_others.view_as(others), None


def _columns(others: Tensor, picked: Tensor) -> list[tuple[Tensor, torch.Size]]:
    """For each k the rows of ``others`` [b x M, D] that are wanted, [a x b x N], and the shape [a, b, N]."""
    b, m, _ = others.shape
    first = m * torch.arange(b, device=picked.device)[:, None]
    return [((column + first).flatten(), column.shape) for column in picked.unbind(-1)]
