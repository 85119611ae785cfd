"""One of the processes that ``doctor`` starts under torchrun: adds its number to the others' and checks the sum."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from relicctl.core.distributed import destroy_distributed, init_distributed


def main(device: str) -> int:
    """The process's exit code: 0 when the sum is right."""
    world = init_distributed(device)
    place = torch.device("cuda", world.local_rank) if device == "cuda" else torch.device("cpu")
    number = torch.tensor(float(world.rank + 1), device=place)
    dist.all_reduce(number)
    right = number.item() == world.size * (world.size + 1) / 2
    destroy_distributed()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
