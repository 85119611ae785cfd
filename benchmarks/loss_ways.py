"""The ways to compute the loss with n = 10 sampled negatives at B = 4096, V = 6, L = 4, D = 256, and what they take.

Each way runs in a process of its own, so that its peak memory is its own; forward and backward, processor seconds.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from relicctl.core import loss as ours
from relicctl.core.loss import relicv2_loss, sample_negatives

BATCH, VIEWS, LARGE, DIM, NEGATIVES, RUNS = 4096, 6, 4, 256, 10, 3
KEYS = {"large": LARGE, "temperature": 0.2, "alpha": 1.0, "beta": 5.0}


def gathered(z: Tensor, t: Tensor, picked: Tensor) -> Tensor:
    """The candidates' vectors of one pair of views side by side, [N, K, D], saved for the backward pass."""

    def products(anchors: Tensor, others: Tensor) -> Tensor:
        chosen = others.index_select(0, picked.flatten()).view(*picked.shape, -1)
        return torch.bmm(chosen, anchors[..., None])[..., 0]

    return ours._sum_terms(products(z, t), products(t, z), None)


def matrix(z: Tensor, t: Tensor, picked: Tensor) -> Tensor:
    """All products of one pair of views, [N, N], then the candidates' own."""
    products = z @ t.T
    return ours._sum_terms(products.gather(-1, picked), products.T.gather(-1, picked), None)


def by_pairs(way: Callable[..., Tensor], recompute: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def value(online: Tensor, target: Tensor, negatives: Tensor) -> Tensor:
        own = torch.arange(BATCH)[:, None].expand(VIEWS, LARGE, BATCH, 1)
        picked = torch.cat([own, negatives], -1)
        z, t = F.normalize(online, dim=-1) / KEYS["temperature"], F.normalize(target, dim=-1)
        sums = []
        for v in range(VIEWS):
            for l in range(LARGE):
                pair = z[v], t[l], picked[v, l]
                sums.append(checkpoint(way, *pair, use_reentrant=False) if recompute else way(*pair))
        nll, kl, _ = (torch.stack(sums).sum(0) / (VIEWS * LARGE * BATCH)).unbind()
        return KEYS["alpha"] * nll + KEYS["beta"] * kl

    return value


def as_in_relicctl(online: Tensor, target: Tensor, negatives: Tensor) -> Tensor:
    return relicv2_loss(online, target, negatives=negatives, **KEYS)["loss"]


WAYS = {
    "gathered vectors": by_pairs(gathered, recompute=False),
    "gathered vectors, recomputed": by_pairs(gathered, recompute=True),
    "full matrix, recomputed": by_pairs(matrix, recompute=True),
    "fetched one by one (relicctl)": as_in_relicctl,
}


def measure(name: str) -> dict[str, object]:
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    online, target = torch.randn(VIEWS, BATCH, DIM, generator=draw), torch.randn(LARGE, BATCH, DIM, generator=draw)
    negatives = sample_negatives(VIEWS, LARGE, BATCH, BATCH, NEGATIVES, draw)
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(RUNS + 1):
        online = online.detach().requires_grad_()
        start = time.process_time()
        loss = WAYS[name](online, target, negatives)
        loss.backward()
        seconds.append(round(time.process_time() - start, 3))
    assert online.grad is not None
    return {
        "loss": loss.item(),
        "gradient": online.grad.double().abs().sum().item(),
        "core_seconds": seconds[1:],
        "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
    }


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    for name in WAYS:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        print(f"{name:30s}", done.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
