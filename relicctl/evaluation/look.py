"""How an evaluation looks at labelled images: through an encoder that is frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from relicctl.config.linear import LinearEvalConfig
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.data.bad_images import BadImages
from relicctl.evaluation.features import IMAGES_PER_CHUNK, EvalImages, extract_features
from relicctl.evaluation.labelled import LabelledDataset
from relicctl.runs import RunFolder


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
        world: World | None = None,
    ) -> None:
        self.encoder: nn.Module = encoder.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.size = config.eval.size or int(encoder.metadata["size"])
        self.crop_ratio = config.eval.crop_ratio or float(encoder.metadata["crop_ratio"])
        self.device, self.world = device, world or World()
        self._console, self._max_bad = console, config.data.max_bad
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
