"""Compute twice to keep less: the part's input is kept for the backward pass, everything inside is made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def run_checkpointed(function: Callable[..., Any], module: nn.Module, *inputs: Any) -> Any:
    """``function(*inputs)``, which runs ``module`` and draws no random numbers; same values and gradients.

    BatchNorm sees the batch twice but counts it once in its running statistics.
    """
    # Compiled code moves the running statistics once by itself, and takes no context.
    keys: dict[str, Any] = {}
    if not torch.compiler.is_compiling():
        keys["context_fn"] = lambda: (nullcontext(), _preserve_running_stats(module))
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **keys)


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
