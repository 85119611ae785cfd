"""ReLICv2's loss (arXiv 2201.05119, section 3; ReLIC, arXiv 2010.07922): likelihood plus invariance.

Shape letters: V views, the L large ones first; N images here, M images in all processes; D embedding size;
n negatives; K candidates: an image itself and its negatives.

For image i, view v and large view l, with z the online and t the target embeddings, both of unit length:

    p(j) = softmax over the candidates j of <z_i^v, t_j^l> / temperature
    r(j) = softmax over the same candidates of <t_i^l, z_j^v> / temperature
    NLL  = - log p(i)
    KL   = stopgrad(sum_j p(j) log p(j)) - sum_j p(j) log r(j)
    loss = mean over v, l and i of  alpha NLL + beta KL
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from relicctl.core.distributed import DistributedGather

# With more logits than this (V x L x N x M) the pairs (v, l) are computed one by one, and again in the backward
# pass, so that only one pair's logits are in memory at a time.
MAX_LOGITS = 2**24

# Where the batch holds so many times the candidates, only their logits are computed, from vectors that are fetched
# one by one; below, the matrix of all logits is faster (measured on a CPU: equal at about 45).
GATHER_MIN_RATIO = 64
PAIRWISE_DEVICES = ("cpu",)  # where fetched vectors must fit the caches; elsewhere few kernel launches matter more

# Floyd's algorithm makes n^2 comparisons per row, a random order sorts M keys: the former is used up to n^2 = 64 M.
FLOYD_MAX_RATIO = 64

Negatives = int | Literal["all"] | Tensor


def relicv2_loss(
    online: Tensor,
    target: Tensor,
    *,
    large: int,
    temperature: float,
    alpha: float,
    beta: float,
    negatives: Negatives,
    generator: torch.Generator | None = None,
    invariance: Literal["transposed", "swapped"] = "transposed",
    gather: DistributedGather | None = None,
) -> dict[str, Tensor]:
    """Return ReLICv2's loss and its parts; see the module's docstring for the formula and the shape letters.

    All is computed in float32 or better under any autocast.

    Args:
        online: [V, N, D], outputs of the online network, the large views first; brought to unit length here.
        target: [L, N, D], outputs of the target network; brought to unit length and detached here.
        large: L, the number of large views.
        temperature: of the softmax, above 0 (tau in the paper).
        alpha: weight of the likelihood term.
        beta: weight of the invariance term.
        negatives: how many other images of the global batch, drawn anew for every v, l and i; or ``"all"`` others;
            or int64 [V, L, N, n], rows of the global batch.
        generator: draws the negatives; best on the device of the outputs.
        invariance: ``transposed`` is the formula above; ``swapped`` takes as r, where both views are large, the
            likelihood of the swapped pair, <z_i^l, t_j^v>.
        gather: joins the batches of a process group. Loss and gradient, averaged over the processes, are then
            those of one process with the joined batch.

    Returns:
        Scalars ``loss``, ``nll``, ``kl`` and, without gradient, ``entropy``: the mean entropy of p in nats.

    Raises:
        ValueError: for shapes, a temperature or negatives that make no sense.
    """
    if online.ndim != 3 or not 1 <= large <= len(online) or target.shape != (large, *online.shape[1:]):
        raise ValueError(f"online {tuple(online.shape)} and target {tuple(target.shape)} do not fit large={large}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if invariance not in ("transposed", "swapped"):
        raise ValueError(f"unknown invariance {invariance!r}: transposed or swapped")
    views, rows = online.shape[:2]
    with torch.autocast(online.device.type, enabled=False):
        z_VND = l2_normalize(online) / temperature  # one online factor in each logit
        t_LND = l2_normalize(target.detach())
        z_VMD, t_LMD = (gather.gather_online(z_VND), gather.gather_target(t_LND)) if gather else (z_VND, t_LND)
        first, total = gather.get_offset_and_total(rows) if gather else (0, rows)
        candidates = _build_candidates(negatives, online, large, first, total, generator)
        terms = _PairTerms(z_VND, t_LND, z_VMD, t_LMD, first, candidates, invariance == "swapped")
        nll, kl, entropy = (terms.compute_sum() / (views * large * rows)).unbind()
    return {"loss": alpha * nll + beta * kl, "nll": nll, "kl": kl, "entropy": entropy.detach()}


@dataclass(frozen=True)
class _PairTerms:
    """The terms of the loss for blocks of view pairs (v, l), each in the way that is fastest for its size."""

    z_VND: Tensor
    t_LND: Tensor
    z_VMD: Tensor
    t_LMD: Tensor
    first: int  # our first row of the global batch
    candidates: Tensor | None  # [V, L, N, K]; None: all images
    swapped: bool

    @property
    def gathers(self) -> bool:
        """Whether only the candidates' logits are computed, in place of a matrix of all."""
        return self.candidates is not None and GATHER_MIN_RATIO * self.candidates.shape[-1] <= self.z_VMD.shape[1]

    def compute_sum(self) -> Tensor:
        """[3]: sums of NLL, KL and entropy over all v, l and i."""
        (views, rows), large, total = self.z_VND.shape[:2], len(self.t_LND), self.z_VMD.shape[1]
        pairs = [(slice(v, v + 1), slice(l, l + 1)) for v in range(views) for l in range(large)]
        if not self.gathers and views * large * rows * total > MAX_LOGITS:
            sums = [checkpoint(self.compute, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
        elif self.gathers and self.z_VND.device.type in PAIRWISE_DEVICES:
            sums = [self.compute(*pair) for pair in pairs]
        elif self.swapped and large < views:
            sums = [self.compute(v, slice(0, large)) for v in (slice(0, large), slice(large, views))]
        else:
            sums = [self.compute(slice(0, views), slice(0, large))]
        return torch.stack(sums).sum(0)

    def compute(self, v: slice, l: slice) -> Tensor:
        """[3]: the sums over the views ``v``, the large views ``l`` and all images."""
        indices = None if self.candidates is None else self.candidates[v, l]
        fetched = indices if self.gathers else None
        fetched_reverse = None if fetched is None else fetched.transpose(0, 1)
        forward = _compute_logits(self.z_VND[v], self.t_LMD[l], fetched)
        if self.swapped and v.stop <= len(self.t_LND):
            reverse = _compute_logits(self.z_VND[l], self.t_LMD[v], fetched_reverse).transpose(0, 1)
        elif self.z_VMD is self.z_VND and not self.gathers:
            reverse = forward.transpose(2, 3)
        else:
            reverse = _compute_logits(self.t_LND[l], self.z_VMD[v], fetched_reverse).transpose(0, 1)
        if indices is not None and not self.gathers:
            forward, reverse = forward.gather(-1, indices), reverse.gather(-1, indices)
        return _sum_terms(forward, reverse, self.first if indices is None else None)


def sample_negatives(
    views: int, large: int, rows: int | Tensor, total: int, n: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return int64 [views, large, R, n]: for each v, l and row, n of the ``total`` images other than the row itself.

    Without replacement; every set of n is equally likely (its order is not random), whatever the other draws.
    ``rows``: which rows are wanted, or how many from the first. All ``total`` rows are drawn for, so that
    processes with equal generators see parts of one draw. The generator, the rows and the result live on one
    device, which is never waited for. ValueError unless 1 <= n < total.
    """
    if not 1 <= n < total:
        raise ValueError(f"{n} negatives cannot be drawn from a batch of {total}: at least 1, at most {total - 1}")
    if isinstance(rows, int):
        rows = torch.arange(rows, device=generator.device if generator else None)

    def draw_random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=rows.device, dtype=torch.float64)

    others = total - 1
    if n * n <= FLOYD_MAX_RATIO * total:
        chosen = _sample_floyd(draw_random(views, large, total, n)[:, :, rows], others)
    else:  # the first n of a random order, pair by pair since the keys are many
        orders = [draw_random(total, others)[rows].argsort(-1)[:, :n] for _ in range(views * large)]
        chosen = torch.stack(orders).unflatten(0, (views, large))
    return chosen + (chosen >= rows[:, None])  # counted among the others: step over oneself


def _sample_floyd(u: Tensor, population: int) -> Tensor:
    """Turn uniform u [..., n] into [..., n] distinct integers below ``population``.

    Floyd's algorithm (Bentley and Floyd, CACM 1987): the k-th pick is uniform from 0 to ``top``, which grows
    with k; a pick that is taken already is replaced by ``top``, which cannot be.
    """
    n = u.shape[-1]
    tops = torch.arange(population - n, population, device=u.device)
    picks = (u * (tops + 1)).long()
    for k in range(1, n):
        taken = (picks[..., :k] == picks[..., k : k + 1]).any(-1)
        picks[..., k] = torch.where(taken, tops[k], picks[..., k])
    return picks


def _build_candidates(
    negatives: Negatives, online: Tensor, large: int, first: int, total: int, generator: torch.Generator | None
) -> Tensor | None:
    """Return [V, L, N, K] rows of the global batch, the image itself first; None stands for all ``total`` of them."""
    (views, rows, _), device = online.shape, online.device
    if isinstance(negatives, str):
        if negatives != "all":
            raise ValueError(f"negatives must be a number, rows or 'all', got {negatives!r}")
        return None
    if isinstance(negatives, Tensor):
        if negatives.shape[:-1] != (views, large, rows):
            raise ValueError(f"negatives {tuple(negatives.shape)}: expected ({views}, {large}, {rows}, n)")
        chosen = negatives
        self_rows = torch.arange(first, first + rows, device=chosen.device)
    elif 1 <= negatives == total - 1:
        return None
    else:
        self_rows = torch.arange(first, first + rows, device=generator.device if generator else device)
        chosen = sample_negatives(views, large, self_rows, total, negatives, generator)
    with_self = torch.cat([self_rows[:, None].expand(views, large, rows, 1), chosen], dim=-1)
    return with_self.to(device, non_blocking=True)


def l2_normalize(x: Tensor) -> Tensor:
    """Return ``x`` divided by its length along the last dimension, in float32 or better."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _compute_logits(anchors: Tensor, others: Tensor, indices: Tensor | None) -> Tensor:
    """[a, N, D], [b, M, D] -> [a, b, N, M], a view of one matrix product; or only those of ``indices`` [a, b, N, K]."""
    return torch.einsum("and,bmd->abnm", anchors, others) if indices is None else gather_dot(anchors, others, indices)


def _sum_terms(forward: Tensor, reverse: Tensor, first: int | None) -> Tensor:
    """Logits [v, l, N, K] -> [3]: sums of NLL, KL and entropy over v, l and i.

    The image itself is the first candidate; with ``first``, our first row, all images are candidates in their order.
    """
    log_p, log_r = F.log_softmax(forward, -1), F.log_softmax(reverse, -1)
    log_p_self = log_p[..., 0] if first is None else log_p.diagonal(offset=first, dim1=-2, dim2=-1)
    p = log_p.exp()
    p_log_p = (p * log_p).detach()  # only the entropy is detached, p below is not
    return torch.stack([-log_p_self.sum(), (p_log_p - p * log_r).sum(), -p_log_p.sum()])


def gather_dot(anchors: Tensor, others: Tensor, indices: Tensor) -> Tensor:
    """Return [a, b, N, K]: <anchors[a, n], others[b, indices[a, b, n, k]]>.

    ``anchors`` [a, N, D] and ``others`` [b, M, D] are differentiable once; ``indices`` is int64 [a, b, N, K]. The
    vectors are fetched one k at a time, and again in the backward pass: memory for a x b x N x D numbers, whatever K.
    """
    products: Tensor = _GatherDot.apply(anchors, others, indices)
    return products


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
    """For each k return the rows to fetch of ``others`` as [b x M, D], [a x b x N], and the shape [a, b, N]."""
    b, m, _ = others.shape
    first = m * torch.arange(b, device=indices.device)[:, None]
    return [((column + first).flatten(), column.shape) for column in indices.unbind(-1)]
