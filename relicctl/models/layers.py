"""BatchNorm over the batch of all ranks, on CUDA by PyTorch's layer, else by the one here; activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from relicctl.core.distributed import all_reduce_sum

M = TypeVar("M", bound=nn.Module)


def convert_sync_batchnorm(module: M, device: torch.device) -> M:
    """Let every BatchNorm of ``module`` take its statistics over all ranks; the state-dict names stay."""
    if device.type == "cuda":
        return cast(M, nn.SyncBatchNorm.convert_sync_batchnorm(module))
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.__class__ = _CPUSyncBatchNorm  # same parameters and buffers, another forward
    return module


class _CPUSyncBatchNorm(_BatchNorm):
    """PyTorch's SyncBatchNorm is for accelerators only; this is the same sum over ranks for a CPU.

    Sums are in float64: the difference of two large ones then costs no digits of the variance.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        dims = [d for d in range(input.ndim) if d != 1]
        x = input.double()
        count = torch.full_like(x.sum(dims), input.numel() / input.shape[1])
        total, squares, count = all_reduce_sum(torch.stack([x.sum(dims), x.square().sum(dims), count])).unbind()
        mean = total / count
        variance = squares / count - mean.square()
        self._update_running_stats(mean.detach(), variance.detach() * count / (count - 1))
        shape = [-1 if d == 1 else 1 for d in range(input.ndim)]
        scale = self.weight * (variance + self.eps).rsqrt()
        return ((x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(input.dtype)

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum or 0.1)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum or 0.1)
        self.num_batches_tracked += 1

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions: 1d and 2d norms both become this class."""


def run_checkpointed(function: Callable[..., Any], module: nn.Module, *inputs: Any) -> Any:
    """Return ``function(*inputs)``, saving only the inputs for the backward pass, which computes the rest again.

    ``function`` runs ``module`` and draws no random numbers; values and gradients are the same. BatchNorm sees the
    batch twice but counts it once in its running statistics.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if not torch.compiler.is_compiling():  # compiled code updates the running statistics once, and takes no context
        options["context_fn"] = lambda: (nullcontext(), _preserve_running_stats(module))
    return checkpoint(function, *inputs, **options)


@contextmanager
def _preserve_running_stats(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    saved = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        for name, buffer in norm.named_buffers(recurse=False):
            norm._buffers[name] = buffer.clone()  # copies take the second update
    try:
        yield
    finally:
        for norm, buffers in zip(norms, saved, strict=True):
            norm._buffers.update(buffers)
