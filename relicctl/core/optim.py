"""LARS (You et al., arXiv 1708.03888, in BYOL's order of operations), optimisers by name, and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer


class LARS(Optimizer):
    """Momentum SGD whose step is scaled per tensor by ``trust`` x |parameter| / |gradient|.

        g += weight_decay * p
        g *= trust * |p| / |g|      (1 where either norm is 0)
        mu = momentum * mu + g
        p -= lr * mu

    A group with ``adapt=False`` skips the scaling. Uses foreach operations and never waits for the device.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, *, momentum: float = 0.9, weight_decay: float = 0.0,
        trust: float = 1e-3, adapt: bool = True,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": adapt}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update_group(params, group)
        return loss

    def _update_group(self, params: list[Tensor], group: dict[str, Any]) -> None:
        updates: list[Tensor] = [p.grad for p in params if p.grad is not None]
        if group["weight_decay"]:
            updates = list(torch._foreach_add(updates, params, alpha=group["weight_decay"]))
        if group["adapt"]:
            param_norms = torch.stack(torch._foreach_norm(params))
            update_norms = torch.stack(torch._foreach_norm(updates))
            ratios = group["trust"] * param_norms / update_norms
            ratios = torch.where((param_norms > 0) & (update_norms > 0), ratios, 1.0)
            updates = list(torch._foreach_mul(updates, ratios.unbind()))
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])


def build_param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Return two groups: weights; and, without decay and adaptation, biases and BatchNorm (one-dimensional).

    Parameters that need no gradient are left out, and so is a group without parameters.
    """
    params = [p for _, p in named_parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay, "adapt": True},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name: str, named_parameters: Iterable[tuple[str, nn.Parameter]], lr: float, momentum: float, weight_decay: float
) -> Optimizer:
    """Build ``lars``, ``sgd`` (classical momentum) or ``adamw`` (``momentum`` is its first beta, the second is 0.999).

    The training loop sets the learning rate of each step. Raises ValueError for another name.
    """
    groups = build_param_groups(named_parameters, weight_decay)
    if name == "lars":
        return LARS(groups, lr, momentum=momentum)
    if name == "sgd":
        return SGD(groups, lr, momentum=momentum, foreach=True)
    if name == "adamw":
        return AdamW(groups, lr, betas=(momentum, 0.999), foreach=True)
    raise ValueError(f"unknown optimiser {name!r}: lars, sgd or adamw")


def compute_learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate: linear to ``peak`` at ``warmup_steps``, then half a cosine to 0 at ``total_steps``."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return peak * (1.0 + math.cos(math.pi * progress)) / 2.0


def compute_ema_gamma(step: int, gamma0: float, total_steps: int) -> float:
    """Return the target's decay: ``gamma0`` at step 0, half a cosine to 1 at ``total_steps`` (BYOL, 3.2)."""
    progress = min(step / total_steps, 1.0)
    return 1.0 - (1.0 - gamma0) * (1.0 + math.cos(math.pi * progress)) / 2.0
