"""Evaluation while a run goes on: kNN and a linear probe on held-out images, never touching the networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from relicctl.config.schema import EvalConfig
from relicctl.core.counted import Stream, draw_uniform
from relicctl.core.distributed import World
from relicctl.core.models.resnet import ResNet
from relicctl.data.bad_images import BadImages
from relicctl.data.sources import ImageDataset
from relicctl.errors import DataError
from relicctl.evaluation.features import EvalImages, extract_features
from relicctl.evaluation.knn import compute_knn_accuracy
from relicctl.evaluation.probe import compute_probe_accuracy

MAX_HOLDOUT = 5000  # images; enough to tell half a point of accuracy


class OnlineEvaluator:
    """Classifies held-out images by the features of training images; ``size`` is the side in pixels.

    Images that cannot be decoded are left out, and counted in ``bad_train`` and ``bad_held_out``.
    """

    def __init__(
        self,
        train: ImageDataset,
        held_out: ImageDataset,
        config: EvalConfig,
        size: int,
        seed: int,
        device: torch.device,
        bad_train: BadImages,
    ) -> None:
        held_out_labels = align_labels(train, held_out)
        bank_rows = permutation(len(train), seed, Stream.EVAL)[: config.train_samples]
        query_rows = permutation(len(held_out), seed, Stream.EVAL)[: config.val_samples]
        assert train.labels is not None
        self._config, self._device = config, device
        self.bad_train, self.bad_held_out = bad_train, BadImages(len(held_out), bad_train.limit)
        self._bank = EvalImages(train.select(bank_rows), size, config.crop_ratio)
        self._queries = EvalImages(held_out.select(query_rows), size, config.crop_ratio)
        self._bank_labels = torch.from_numpy(train.labels[bank_rows]).to(device)
        self._query_labels = torch.from_numpy(held_out_labels[query_rows]).to(device)

    def __call__(self, encoder: ResNet, world: World | None = None) -> dict[str, Any]:
        """``knn20``, ``knn200`` and, if asked for, ``probe_top1``: shares of the held-out images told rightly.

        All processes of ``world`` extract features; the main one classifies, the others are told nothing: {}.
        """
        world = world or World()
        bank = extract_features(encoder, self._bank, self._device, world)
        queries = extract_features(encoder, self._queries, self._device, world)
        bank_rows = torch.from_numpy(self._bank.get_decodable_rows(self.bad_train)).to(self._device)
        query_rows = torch.from_numpy(self._queries.get_decodable_rows(self.bad_held_out)).to(self._device)
        if not world.is_main:
            return {}
        args = bank[bank_rows], self._bank_labels[bank_rows], queries[query_rows], self._query_labels[query_rows]
        metrics: dict[str, Any] = {f"knn{k}": value for k, value in compute_knn_accuracy(*args, ks=(20, 200)).items()}
        if self._config.probe:
            metrics["probe_top1"] = compute_probe_accuracy(*args)
        return metrics

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "knn": "cosine, weights exp(similarity / 0.07)",
            "probe": "multinomial logistic regression on standardised frozen features" if self._config.probe else None,
            "train_images": len(self._bank) - len(self._bank.bad),
            "val_images": len(self._queries) - len(self._queries.bad),
        }


def permutation(count: int, seed: int, stream: Stream) -> np.ndarray:
    """int64 ``[count]``: a permutation that depends on (seed, stream) alone."""
    return np.argsort(draw_uniform(seed, stream, np.arange(count), n=1)[:, 0], kind="stable")


def split_holdout(source: ImageDataset, share: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """What is left to train on, and the held-out part: ``share`` of the images, at most ``MAX_HOLDOUT``."""
    order = permutation(len(source), seed, Stream.HOLDOUT)
    count = min(max(1, round(share * len(source))), MAX_HOLDOUT)
    return source.select(np.sort(order[count:])), source.select(np.sort(order[:count]))


def align_labels(train: ImageDataset, held_out: ImageDataset) -> np.ndarray:
    """``held_out``'s labels in the numbering of ``train``'s classes, by name. Raises DataError when they differ."""
    if held_out.labels is None:
        raise DataError(
            f"{held_out.spec} has no labels, so nothing can be measured on it.",
            "Give --val one folder per class, or leave it out.",
        )
    number = {name: i for i, name in enumerate(train.classes)}
    missing = [name for name in held_out.classes if name not in number]
    if missing:
        raise DataError(
            f"{held_out.spec} has {len(missing)} classes that {train.spec} has not, {missing[0]!r} among them.",
            "Give --val images of the same classes, in folders of the same names; or --set data.val=null.",
        )
    return np.array([number[name] for name in held_out.classes], dtype=np.int64)[held_out.labels]
