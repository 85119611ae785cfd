"""Evaluation during pretraining: kNN, a linear probe, and warnings of collapse. It does not affect training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import normalize

from relicctl.config.pretrain import PretrainConfig
from relicctl.core.counter_rng import Stream, permutation
from relicctl.core.distributed import SINGLE_PROCESS, World
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImages
from relicctl.evaluation.features import EvalImages, extract_features
from relicctl.evaluation.knn import compute_knn_accuracy
from relicctl.evaluation.labelled_data import align_labels
from relicctl.evaluation.linear import compute_probe_accuracy
from relicctl.models.resnet import ResNet


class OnlineEvaluator:
    """Classifies held-out images by the features of training images.

    Images that cannot be decoded are left out, and counted in ``bad_train`` and ``bad_held_out``.
    """

    def __init__(
        self, train: ImageDataset, held_out: ImageDataset, config: PretrainConfig, device: torch.device, bad: BadImages
    ) -> None:
        eval_config, seed = config.eval, config.seed
        size = eval_config.size or config.views.large.size
        held_out_labels = align_labels(train, held_out)
        bank_rows = permutation(len(train), seed, Stream.EVAL)[: eval_config.knn_train_images]
        query_rows = permutation(len(held_out), seed, Stream.EVAL)[: eval_config.val_images]
        assert train.labels is not None
        self._use_probe, self._device = eval_config.probe, device
        self.bad_train, self.bad_held_out = bad, BadImages(len(held_out), bad.limit)
        self._bank = EvalImages(train.select(bank_rows), size, eval_config.crop_pct)
        self._queries = EvalImages(held_out.select(query_rows), size, eval_config.crop_pct)
        self._bank_labels = torch.from_numpy(train.labels[bank_rows]).to(device)
        self._query_labels = torch.from_numpy(held_out_labels[query_rows]).to(device)

    def __call__(self, encoder: ResNet, world: World = SINGLE_PROCESS) -> dict[str, Any]:
        """Return ``knn20``, ``knn200`` and, if configured, ``probe_top1``: accuracies on the held-out images.

        All ranks extract features; the main one classifies, the others return {}.
        """
        bank = extract_features(encoder, self._bank, self._device, world)
        queries = extract_features(encoder, self._queries, self._device, world)
        bank_rows = torch.from_numpy(self._bank.get_decodable_rows(self.bad_train)).to(self._device)
        query_rows = torch.from_numpy(self._queries.get_decodable_rows(self.bad_held_out)).to(self._device)
        if not world.is_main:
            return {}
        args = bank[bank_rows], self._bank_labels[bank_rows], queries[query_rows], self._query_labels[query_rows]
        metrics: dict[str, Any] = {f"knn{k}": value for k, value in compute_knn_accuracy(*args, ks=(20, 200)).items()}
        if self._use_probe:
            metrics["probe_top1"] = compute_probe_accuracy(*args)
        return metrics

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "knn": "cosine, weights exp(similarity / 0.07)",
            "probe": "multinomial logistic regression on standardised frozen features" if self._use_probe else None,
            "train_images": len(self._bank) - len(self._bank.bad),
            "val_images": len(self._queries) - len(self._queries.bad),
        }


def compute_rankme(features_NF: torch.Tensor) -> float:
    """Return the effective rank: exp of the entropy of the normalised singular values (RankMe, Garrido et al. 2023).

    Between 1 (all features on one line) and min(N, F).
    """
    values = torch.linalg.svdvals(features_NF.detach().float())
    p = values / values.sum().clamp_min(1e-12) + 1e-7
    return float((-(p * p.log()).sum()).exp())


def compute_normalized_std(outputs_ND: torch.Tensor) -> float:
    """Return the std of L2-normalised outputs times sqrt(D): 1 when uniform on the sphere, 0 when collapsed."""
    z = normalize(outputs_ND.detach().float(), dim=1)
    return float(float(z.std(0).mean()) * z.shape[1] ** 0.5)


def get_collapse_warning(metrics: dict[str, Any], rows: int, candidates: int | None = None) -> str | None:
    """Return a sentence when the metrics of a log line indicate collapse, else None.

    ``rows``: the number of features in the rank. ``candidates``: the number of images that the likelihood is over;
    an entropy of log(candidates) means that target outputs no longer distinguish images.
    """
    end = "the network is collapsing"
    if metrics["embedding_std"] < 0.05:
        return f"outputs have almost no spread left (embedding_std {metrics['embedding_std']:.3f} of 1): {end}"
    if rows >= 16 and metrics["rankme"] < 2:
        return f"features span almost one dimension (RankMe {metrics['rankme']:.2f}): {end}"
    if candidates and metrics["entropy"] > 0.999 * math.log(candidates):
        return f"the likelihood is a uniform guess among {candidates} (entropy {metrics['entropy']:.3f}): {end}"
    return None


class CollapseMonitor:
    """Warns once when two log lines in a row say that the representation collapses."""

    def __init__(self, warn: Callable[[str], None], rows: int, candidates: int | None = None) -> None:
        self._warn, self._rows, self._candidates = warn, rows, candidates
        self._was_suspicious = self._warned = False

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        if "rankme" not in metrics or self._warned:
            return
        text = get_collapse_warning(metrics, self._rows, self._candidates)
        if text and self._was_suspicious:
            self._warn(f"step {step}: {text}")
            self._warned = True
        self._was_suspicious = text is not None
