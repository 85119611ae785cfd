"""Features of whole data sets: extracted from centre crops by a frozen encoder, cached in files.

Ranks share the images in whole chunks. So the encoder sees the same batches as on a single rank, and the features
are the same bit for bit wherever machines and thread counts are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
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

from relicctl.config.linear_eval import LinearEvalConfig, RandomCropConfig
from relicctl.config.transfer import FinetuneConfig, TransferConfig
from relicctl.core.atomic_io import write_atomically
from relicctl.core.distributed import SINGLE_PROCESS, World
from relicctl.core.hardware import GIB
from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.data.crops import crop_on_host, make_eval_box
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImages, load_or_next
from relicctl.data.loader import LoaderConfig, ViewLoader
from relicctl.data.photometric import AugmentConfig
from relicctl.data.sampler import Sampler
from relicctl.data.views import CropSpec, ViewSpec
from relicctl.errors import DataError, RunFailed
from relicctl.evaluation.labelled_data import LabelledDataset
from relicctl.runs.distributed import RunContext, resolve_num_workers
from relicctl.runs.folder import RunFolder

IMAGES_PER_CHUNK = 128
CropConfig = RandomCropConfig | FinetuneConfig


class EvalImages:
    """The centre crops of a data set's images, in chunks of uint8 ``[n, size, size, 3]``; cached when they are small.

    ``bad``: after a pass, why each image that was replaced by the next one could not be decoded.
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
        """Return the rows (int64) of images that could be decoded in the last pass; report the others by name."""
        for index, reason in sorted(self.bad.items()):
            report.add(self._source.get_name(index), reason)
        return np.setdiff1d(np.arange(len(self)), list(self.bad))

    def get_rank_ranges(self, world: World) -> list[tuple[int, int]]:
        """Return, for each rank, its first image and the one after its last."""
        chunks = -(-len(self) // IMAGES_PER_CHUNK)
        return [
            (first * IMAGES_PER_CHUNK, min(last * IMAGES_PER_CHUNK, len(self)))
            for first, last in world.split_evenly(chunks)
        ]

    def iter_chunks(self, world: World) -> Iterator[np.ndarray]:
        """Yield this rank's chunks, the same at every call."""
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
        image, _, skipped = load_or_next(self._source, index)
        self.bad.update(skipped)
        height, width = image.shape[:2]
        return np.asarray(crop_on_host(image, make_eval_box(height, width, self._ratio)[None], self._size)[0])


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[nn.Module]:
    """Put ``module`` in eval mode without gradients, and restore the mode of every submodule afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield module
    finally:
        for m, mode in modes.items():
            m.training = mode


def extract_features(
    encoder: nn.Module, images: EvalImages, device: torch.device, world: World = SINGLE_PROCESS, bar: Any = None
) -> Tensor:
    """Return the features of all images, float32 ``[N, F]`` on ``device``, the same on every rank.

    Each rank extracts its part, in float32; ``bar``: a progress bar of its chunks.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
    local_features = []
    with eval_mode(encoder):
        for chunk in images.iter_chunks(world):
            pixels = torch.from_numpy(chunk).to(device).permute(0, 3, 1, 2)
            local_features.append(encoder((pixels / 255 - mean) / std))
            if bar is not None:
                bar.update(len(local_features), {})
    local_width = local_features[0].shape[1] if local_features else None
    gathered = world.all_gather_object([local_width, sorted(images.bad.items())])
    width = next(width for width, _ in gathered if width is not None)
    for _, bad in gathered:
        images.bad.update((index, reason) for index, reason in bad)
    features = torch.cat(local_features) if local_features else torch.empty(0, width, device=device)
    return world.gather_rows(features, [last - first for first, last in images.get_rank_ranges(world)])


def compute_encoder_hash(encoder: nn.Module, size: int, crop_ratio: float) -> str:
    """Return the SHA-256 (hex) of all that decides the features: the weights, and how images are cropped."""
    digest = hashlib.sha256(f"{type(encoder).__name__} {size} {crop_ratio}".encode())
    for attribute in ("arch", "stem", "padding"):
        digest.update(f"{attribute}={getattr(encoder, attribute, None)}".encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def make_bad_images(run: RunFolder, num_images: int, max_fraction: float) -> BadImages:
    """Count the undecodable images of a data set; each is listed in the run's folder once."""
    recorded = run.read_bad_images()

    def record(name: str, reason: str) -> None:
        if name not in recorded:
            recorded.add(name)
            run.add_bad_image(name, reason)

    return BadImages(num_images, max_fraction, record, str(run.bad_images_path))


def get_eval_crop(encoder: Any, config: LinearEvalConfig | TransferConfig) -> tuple[int, float]:
    """Return the side in pixels and the crop ratio of an encoder's images: the config's, or those of its training."""
    metadata = encoder.metadata
    return config.eval.size or int(metadata["size"]), config.eval.crop_pct or float(metadata["crop_ratio"])


@dataclass(frozen=True)
class LabelledFeatures:
    """Of images that could be decoded: ``features`` ``[N, F]``, ``rows`` in the data set.

    ``labels``: int64 ``[N]``, or int8 ``[N, C]`` of multi-label images.
    """

    features: Tensor
    labels: Tensor
    rows: np.ndarray

    @classmethod
    def from_rows(cls, features: Tensor, images: LabelledDataset, rows: np.ndarray) -> LabelledFeatures:
        """Add the labels to the features of ``rows``."""
        return cls(features, torch.from_numpy(images.labels[rows]).to(features.device), rows)

    def select(self, indices: np.ndarray) -> LabelledFeatures:
        picked = torch.from_numpy(indices).to(self.labels.device)
        return LabelledFeatures(self.features[picked], self.labels[picked], self.rows[indices])


class FeatureExtractor:
    """A frozen encoder and the crop of its images. Undecodable images are left out and listed in the run's folder.

    The ranks extract together: each a part of the images, and all of them get all features.
    """

    def __init__(self, encoder: Any, config: LinearEvalConfig | TransferConfig, context: RunContext) -> None:
        self.size, self.crop_ratio = get_eval_crop(encoder, config)
        self.encoder: nn.Module = encoder.to(context.device).to(memory_format=torch.channels_last).eval()
        self.encoder.requires_grad_(False)
        self.context, self._config = context, config

    def build_crop_loader(self, source: ImageDataset, sampler: Sampler, crop: CropConfig, cache: str) -> ViewLoader:
        """Build the loader of one random crop of every image, flipped at random and not augmented otherwise."""
        config, context = self._config, self.context
        flip = AugmentConfig(crop.hflip_prob, 0, grayscale_prob=0, blur_prob=(0, 0), solarize_prob=(0, 0))
        workers = resolve_num_workers(config.runtime, context.device, cache)
        return ViewLoader(
            source, sampler, ViewSpec((CropSpec(1, self.size, crop.scale),), crop.ratio, flip),
            LoaderConfig(config.seed, context.device, context.world, cache=cache, workers=workers),
            self._make_bad_images(source),
        )  # fmt: skip

    def _make_bad_images(self, source: ImageDataset) -> BadImages:
        return make_bad_images(self.context.run, len(source), self._config.data.max_corrupt_fraction)

    def __call__(self, images: LabelledDataset) -> LabelledFeatures:
        device, world, console = self.context.device, self.context.world, self.context.console
        crops = EvalImages(images.source, self.size, self.crop_ratio)
        first, last = crops.get_rank_ranges(world)[world.rank]
        at_once = IMAGES_PER_CHUNK * world.size
        console.info(f"features of {len(crops)} images of {images.source.spec}, {at_once} per step")
        with console.progress(-(-(last - first) // IMAGES_PER_CHUNK)) as bar:
            features = extract_features(self.encoder, crops, device, world, bar)
        rows = crops.get_decodable_rows(self._make_bad_images(images.source))
        return LabelledFeatures.from_rows(features[torch.from_numpy(rows).to(device)], images, rows)


def load_or_extract(path: Path, images: LabelledDataset, extractor: FeatureExtractor) -> LabelledFeatures | None:
    """Return the features of ``images``: from ``path`` if it is whole, else by ``extractor``.

    All ranks extract; the main one alone reads, writes and returns features, the others return None.
    Raises DataError for features that are not finite, RunFailed when they cannot be written.
    """
    world = extractor.context.world
    cached = _load_features(path, images, extractor.context.device) if world.is_main else None
    if world.broadcast_from_main(lambda: cached is not None):
        return cached
    extracted = extractor(images)
    world.broadcast_from_main(lambda: _save_features(path, extracted.features, extracted.rows))
    return extracted if world.is_main else None


def _load_features(path: Path, images: LabelledDataset, device: torch.device) -> LabelledFeatures | None:
    try:
        tensors = load_file(path, device=str(device))
        return LabelledFeatures.from_rows(tensors["features"], images, tensors["rows"].cpu().numpy())
    except (FileNotFoundError, SafetensorError, KeyError):
        return None  # missing or damaged


def _save_features(path: Path, features: Tensor, rows: np.ndarray) -> None:
    bad = int((~features.isfinite().all(1)).sum())
    if bad:
        what = f"The encoder gives features that are not finite for {bad} of {len(rows)} images."
        raise DataError(what, "Its weights are damaged or it diverged in training: take an earlier checkpoint.")
    tensors = {"features": features.cpu().contiguous(), "rows": torch.from_numpy(rows)}
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary))
    except (OSError, SafetensorError) as reason:
        what = f"Features cannot be saved in {path.parent} ({getattr(reason, 'strerror', None) or reason})."
        fix = "Free some space or choose another --out; --resume keeps everything that is finished."
        raise RunFailed(what, fix) from None
