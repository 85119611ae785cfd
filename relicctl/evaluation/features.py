"""Features of whole data sets: images are prepared once, the encoder is left exactly as it was.

Several processes share the images out in whole chunks. So the encoder sees the very batches that it sees in one
process, and the features are the same to the bit where machines and thread counts are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from relicctl.config.linear_eval import LinearEvalConfig
from relicctl.console import Console
from relicctl.core.atomic_io import write_atomically
from relicctl.core.distributed import SINGLE_PROCESS, World
from relicctl.core.hardware import GIB
from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.data.crops import crop_on_host, make_eval_box
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImages, load_or_next
from relicctl.errors import DataError, RunFailed
from relicctl.evaluation.labelled_data import LabelledDataset
from relicctl.runs.folder import RunFolder

IMAGES_PER_CHUNK = 128


class EvalImages:
    """The centre crops of a source's images, in chunks of uint8 ``[n, size, size, 3]``; kept when they are small.

    ``bad``: after a pass, what is wrong with each image that could not be decoded and was replaced by the next.
    """

    def __init__(self, source: ImageDataset, size: int, crop_ratio: float) -> None:
        self._source, self._size, self._ratio = source, size, crop_ratio
        self.labels = source.labels
        self._use_cache = len(source) * size * size * 3 <= GIB
        self._cached: list[np.ndarray] = []
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._source)

    def get_decodable_rows(self, report: BadImages) -> np.ndarray:
        """int64: the rows whose image could be decoded, after a pass; the others are reported by name."""
        for index, reason in sorted(self.bad.items()):
            report.add(self._source.get_name(index), reason)
        return np.array([row for row in range(len(self)) if row not in self.bad], dtype=np.int64)

    def get_rank_ranges(self, world: World) -> list[tuple[int, int]]:
        """Of each process, the first and last+1 image."""
        chunks = -(-len(self) // IMAGES_PER_CHUNK)
        return [
            (first * IMAGES_PER_CHUNK, min(last * IMAGES_PER_CHUNK, len(self)))
            for first, last in world.split_evenly(chunks)
        ]

    def iter_chunks(self, world: World) -> Iterator[np.ndarray]:
        """This process's share, the same at every call."""
        if self._cached:
            yield from self._cached
            return
        computed = []
        start, stop = self.get_rank_ranges(world)[world.rank]
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // processes)) as pool:
            for first in range(start, stop, IMAGES_PER_CHUNK):
                chunk = np.stack(list(pool.map(self._crop, range(first, min(first + IMAGES_PER_CHUNK, stop)))))
                if self._use_cache:
                    computed.append(chunk)
                yield chunk
        self._cached = computed

    def _crop(self, index: int) -> np.ndarray:
        image, _, passed = load_or_next(self._source, index)
        self.bad.update(passed)
        height, width = image.shape[:2]
        return crop_on_host(image, make_eval_box(height, width, self._ratio)[None], self._size)[0]


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` in eval mode without gradients; every submodule's own mode comes back afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield module
    finally:
        for m, mode in modes.items():
            m.training = mode


def extract_features(
    encoder: nn.Module,
    images: EvalImages,
    device: torch.device,
    world: World = SINGLE_PROCESS,
    on_chunk: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """float32 ``[N, F]`` features of all images on ``device``, in float32 arithmetic, alike on every process.

    Each process extracts its share; ``show`` is told how many chunks of it are done.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
    local_features = []
    with eval_mode(encoder):
        for chunk in images.iter_chunks(world):
            pixels = torch.from_numpy(chunk).to(device).permute(0, 3, 1, 2)
            local_features.append(encoder((pixels / 255 - mean) / std))
            on_chunk(len(local_features))
    gathered = world.all_gather_object(
        [local_features[0].shape[1] if local_features else None, sorted(images.bad.items())]
    )
    width = next(found for found, _ in gathered if found is not None)
    for _, bad in gathered:
        images.bad.update((index, reason) for index, reason in bad)
    features = torch.cat(local_features) if local_features else torch.empty(0, width, device=device)
    return world.gather_rows(features, [last - first for first, last in images.get_rank_ranges(world)])


def compute_encoder_hash(encoder: nn.Module, size: int, crop_ratio: float) -> str:
    """SHA-256 (hex) over the weights and how images are shown: what decides the features."""
    digest = hashlib.sha256(f"{type(encoder).__name__} {size} {crop_ratio}".encode())
    for attribute in ("arch", "stem", "padding"):
        digest.update(f"{attribute}={getattr(encoder, attribute, None)}".encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_or_extract(
    path: Path, device: torch.device, extract: Callable[[], tuple[Tensor, np.ndarray]], world: World
) -> tuple[Tensor, np.ndarray] | None:
    """What ``make`` gives, features ``[N, F]`` and their rows int64 ``[N]``, from ``path`` if it is there and whole.

    All processes of ``world`` make them; the main one alone reads, writes and gets them, the others get None.
    Raises DataError for features that are not finite, RunFailed when they cannot be written.
    """
    found = _load_features(path, device) if world.is_main else None
    if not world.broadcast_from_main(lambda: found is not None):
        extracted = extract()
        world.broadcast_from_main(lambda: _save_features(path, *extracted))
        found = extracted if world.is_main else None
    return found


def _load_features(path: Path, device: torch.device) -> tuple[Tensor, np.ndarray] | None:
    try:
        tensors = load_file(path, device=str(device))
        return tensors["features"], tensors["rows"].cpu().numpy()
    except (FileNotFoundError, SafetensorError, KeyError):
        return None  # not there, or damaged


def _save_features(path: Path, features: Tensor, rows: np.ndarray) -> None:
    bad = int((~features.isfinite().all(1)).sum())
    if bad:
        raise DataError(
            f"The encoder gives features that are not finite for {bad} of {len(rows)} images.",
            "Its weights are damaged or it diverged in training: take an earlier checkpoint.",
        )
    tensors = {"features": features.cpu().contiguous(), "rows": torch.from_numpy(rows)}
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary))
    except (OSError, SafetensorError) as reason:
        raise RunFailed(
            f"Features cannot be kept in {path.parent} ({getattr(reason, 'strerror', None) or reason}).",
            "Make room or choose another --out; with --resume everything finished is taken over.",
        ) from None


@dataclass(frozen=True)
class ExtractedFeatures:
    """What the encoder makes of labelled images: ``features`` ``[N, F]``, ``labels`` ``[N]``, ``rows`` in the data."""

    features: Tensor
    labels: Tensor
    rows: np.ndarray


class FeatureExtractor:
    """The encoder, frozen, and how it is shown images. Those that cannot be decoded are left out and noted.

    The processes of ``world`` look together: each at its share of the images, and all of them see all.
    """

    def __init__(
        self,
        encoder: Any,
        config: LinearEvalConfig,
        device: torch.device,
        run: RunFolder,
        console: Console,
        world: World = SINGLE_PROCESS,
    ) -> None:
        self.encoder: nn.Module = encoder.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.size = config.eval.size or int(encoder.metadata["size"])
        self.crop_ratio = config.eval.crop_pct or float(encoder.metadata["crop_ratio"])
        self.device, self.world = device, world
        self._console, self._max_bad = console, config.data.max_corrupt_fraction
        self._run, self._recorded = run, run.read_bad_images()

    def collect_bad_images(self, images: LabelledDataset) -> BadImages:
        return BadImages(len(images.source), self._max_bad, self._record_bad_image)

    def _record_bad_image(self, name: str, reason: str) -> None:
        if name not in self._recorded:
            self._recorded.add(name)
            self._run.add_bad_image(name, reason)

    def __call__(self, images: LabelledDataset) -> ExtractedFeatures:
        crops = EvalImages(images.source, self.size, self.crop_ratio)
        first, last = crops.get_rank_ranges(self.world)[self.world.rank]
        at_once = IMAGES_PER_CHUNK * self.world.size
        self._console.info(f"features of {len(crops)} images of {images.source.spec}, {at_once} a step")
        with self._console.progress(-(-(last - first) // IMAGES_PER_CHUNK)) as bar:
            features = extract_features(self.encoder, crops, self.device, self.world, lambda done: bar.update(done, {}))
        rows = crops.get_decodable_rows(self.collect_bad_images(images))
        picked = torch.from_numpy(rows).to(self.device)
        return ExtractedFeatures(features[picked], torch.from_numpy(images.labels[rows]).to(self.device), rows)
