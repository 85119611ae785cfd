"""Classification in a comparison: frozen features or fine-tuning on other data sets; all choices on validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from relicctl.config.renamed import restore_old_names
from relicctl.config.transfer import TransferConfig
from relicctl.core.distributed import World
from relicctl.data.value_range import warn_unused_range
from relicctl.errors import UsageError
from relicctl.evaluation.cells import Cell, LoadedEncoder, TransferTask, compute_digest, load_or_compute_cell
from relicctl.evaluation.features import (
    FeatureExtractor,
    LabelledFeatures,
    compute_encoder_hash,
    get_eval_crop,
    load_or_extract,
)
from relicctl.evaluation.finetune import GridSearch
from relicctl.evaluation.knn import iter_knn_votes
from relicctl.evaluation.labelled_data import LabelledDataset
from relicctl.evaluation.logistic_regression import fit_logistic_regression
from relicctl.evaluation.metrics import DATASET_METRICS, ProtocolResult, compute_metric, find_best_candidate
from relicctl.evaluation.transfer_data import Split, TransferDataset, open_transfer_dataset, split_trainval
from relicctl.runs.distributed import RunContext, Session
from relicctl.version import __version__


class ClassificationTransfer(TransferTask):
    """Every protocol with every labelled subset on every data set."""

    config: TransferConfig
    _datasets: list[TransferDataset]

    def load_encoder(self, name: str, encoder: Any) -> LoadedEncoder:
        size, crop_ratio = get_eval_crop(encoder, self.config)
        digest = compute_encoder_hash(encoder, size, crop_ratio)
        return LoadedEncoder(name, encoder, digest, {"sha256": digest, "size": size, "crop_ratio": crop_ratio})

    def open_data(self, session: Session, download: bool) -> None:
        config, world = self.config, session.world

        def open_datasets() -> list[TransferDataset]:
            warn = session.console.warn
            return [open_transfer_dataset(name, config, download=download, warn=warn) for name in config.data.datasets]

        if download and world.size > 1:
            world.broadcast_from_main(lambda: len(open_datasets()))  # one rank downloads
        self._datasets = open_datasets()
        for data in self._datasets:
            resolve_metric(data, config)
            warn_unused_range(data.trainval.source, session.console.warn)
        for labels in map(format_labels, config.labels):
            for data in self._datasets:
                split = split_trainval(data, labels, config.data.val_fraction, config.seed)
                if "finetune" in config.protocol:  # raises UsageError if a batch cannot be split over the ranks
                    for images in (len(split.train), len(split.train) + len(split.val)):
                        world.get_local_rows(min(config.finetune.batch_size, images), "finetune.batch_size")

    def compute_cells(self, encoders: Sequence[LoadedEncoder], context: RunContext) -> list[Cell]:
        extractors = {encoder.name: FeatureExtractor(encoder.encoder, self.config, context) for encoder in encoders}
        return [
            self._compute_cell(encoder, extractors[encoder.name], data, protocol, labels)
            for data in self._datasets
            for protocol in self.config.protocol
            for labels in map(format_labels, self.config.labels)
            for encoder in encoders
        ]

    def _compute_cell(
        self, encoder: LoadedEncoder, extractor: FeatureExtractor, data: TransferDataset, protocol: str, labels: str
    ) -> Cell:
        config, context = self.config, extractor.context
        split = split_trainval(data, labels, config.data.val_fraction, config.seed)
        metric = resolve_metric(data, config)
        settings = getattr(config, protocol).model_dump()
        hashed = restore_old_names("transfer", settings, f"{protocol}.")
        if protocol == "finetune":  # the only protocol that trains a network
            hashed["precision"] = context.precision
        key = compute_digest(
            encoder.hash, data.trainval.source.compute_fingerprint(), data.test.source.compute_fingerprint(),
            data.trainval.source.spec, split.train.tolist(), split.val.tolist(), protocol, hashed, metric,
            config.seed, __version__,
        )  # fmt: skip
        title = f"{encoder.name} on {data.name}, {protocol}, {labels} labels"

        def compute() -> Cell:
            context.console.info(title)
            if protocol == "finetune":
                result = GridSearch(extractor, config, context.run.path / "finetune" / key, data, metric)(split)
                images = {"fit": len(split.train), "validation": len(split.val), "test": len(data.test.labels)}
            else:
                splits = load_feature_splits(encoder.hash, extractor, data, split)
                result, images = evaluate_frozen(protocol, splits, metric, settings, context.world)
            for text in result.warnings:
                context.console.warn(f"{title}: {text}")
            return {
                "encoder": encoder.name, "data": data.name, "protocol": protocol, "labels": labels, "metric": metric,
                "value": result.value, "chosen": result.best_params, "validation": split.val_source,
                "images": images, "warnings": result.warnings, "tried": result.candidates,
            }  # fmt: skip

        names = {"encoder": encoder.name, "data": data.name, "labels": labels}
        return load_or_compute_cell(key, title, names, context, compute)

    def describe_data(self) -> dict[str, Any]:
        config = self.config.data
        return {
            data.name: {
                "source": config.datasets[data.name],
                "classes": len(data.trainval.classes),
                "train": data.num_train,
                "val": len(data.trainval.labels) - data.num_train or None,
                "test": len(data.test.labels),
                "draw": config.samples_per_class.get(data.name),
                **({"test_split": data.draw} if data.draw else {}),
            }
            for data in self._datasets
        }

    def format_notes(self, cells: Sequence[Cell], abbreviations: list[str]) -> list[str]:
        config = self.config
        sampling = [  # says that a value belongs to our split, not to a published one
            f"{name}: {train} images of each class to train on and {test[0] if test else 'all others'} to test on, "
            f"drawn by seed {config.seed}"
            for name, (train, *test) in config.data.samples_per_class.items()
            if name in config.data.datasets
        ]
        sampling += [f"{data.name}: {data.draw}" for data in self._datasets if data.draw]
        chosen = [f"{c['data']}, {c['labels']} labels: chosen on {c['validation']}" for c in cells]
        warnings = [
            f"{c['encoder']} on {c['data']}, {c['protocol']}, {c['labels']} labels: {text}"
            for c in cells
            for text in c["warnings"]
        ]
        return [*sampling, *abbreviations, *dict.fromkeys(chosen), *warnings]


def format_labels(labels: str | float) -> str:
    return labels if isinstance(labels, str) else f"{labels:g}"


def resolve_metric(data: TransferDataset, config: TransferConfig) -> str:
    """Return the metric of a data set. Raises UsageError for one that multi-label images do not have."""
    metric = config.data.metrics.get(data.name)
    if data.trainval.labels.ndim == 1:
        return metric or DATASET_METRICS.get(data.name, "top1")
    if metric not in (None, "map11"):
        what = f"{metric} cannot be computed on {data.name}, whose images are multi-label."
        raise UsageError(what, "Remove it from data.metrics: map11 is used.")
    return "map11"


@dataclass(frozen=True)
class FeatureSplits:
    """The features of a data set of ``classes`` classes, split as it is; ``trainval`` is train and val."""

    train: LabelledFeatures
    val: LabelledFeatures
    trainval: LabelledFeatures
    test: LabelledFeatures
    classes: int


def load_feature_splits(
    encoder_hash: str, extractor: FeatureExtractor, data: TransferDataset, split: Split
) -> FeatureSplits | None:
    """Return the features of all images that can be decoded, cached in the run's folder; on the main rank only."""

    def load(images: LabelledDataset, part: str) -> LabelledFeatures | None:
        name = compute_digest(encoder_hash, part, images.source.spec, images.source.compute_fingerprint())
        return load_or_extract(extractor.context.run.path / "features" / f"{name}.safetensors", images, extractor)

    trainval, test = load(data.trainval, "known"), load(data.test, "test")  # "known" is part of the files' names
    if trainval is None or test is None:
        return None
    parts = (split.train, split.val, np.concatenate([split.train, split.val]))
    train, val, both = (trainval.select(np.flatnonzero(np.isin(trainval.rows, part))) for part in parts)
    return FeatureSplits(train, val, both, test, len(data.trainval.classes))


def evaluate_frozen(
    protocol: str, splits: FeatureSplits | None, metric: str, settings: dict[str, Any], world: World
) -> tuple[ProtocolResult, dict[str, int]]:
    """Evaluate on the main rank, which has the features; all ranks return the result and the numbers of images."""

    def evaluate() -> tuple[dict[str, Any], dict[str, int]]:
        assert splits is not None
        parts = {"fit": splits.train, "validation": splits.val, "test": splits.test}
        images = {name: len(part.labels) for name, part in parts.items()}
        return asdict(FROZEN_PROTOCOLS[protocol](splits, metric=metric, **settings)), images

    result, images = world.broadcast_from_main(evaluate)
    return ProtocolResult(**result), images


def evaluate_logistic(splits: FeatureSplits, *, metric: str, l2: tuple[float, ...]) -> ProtocolResult:
    """Choose lambda on validation, the middle one of equally good ones, and fit again on train and validation."""

    def get_targets(labels: Tensor) -> Tensor:
        """For a softmax; or for one-vs-rest classifiers where each class is ranked by itself."""
        return one_hot(labels, splits.classes).bool() if metric == "map11" and labels.ndim == 1 else labels

    train, val, trainval, test = splits.train, splits.val, splits.trainval, splits.test
    strengths = sorted(l2, reverse=True)
    models = fit_logistic_regression(train.features, get_targets(train.labels), strengths, splits.classes)
    scores = [compute_metric(metric, logits, val.labels) for logits in models.compute_logits(val.features)]
    candidates = [{"lambda": strength, "value": value} for strength, value in zip(models.lambdas, scores, strict=True)]
    strength = find_best_candidate(candidates)["lambda"]
    row = models.lambdas.index(strength)
    start = models.weight[row, None], models.bias[row, None]
    final = fit_logistic_regression(trainval.features, get_targets(trainval.labels), (strength,), splits.classes, start)
    warnings = []
    if len(l2) > 2 and strength in (min(l2), max(l2)):
        end, beyond = ("smallest", "smaller") if strength == min(l2) else ("largest", "larger")
        warnings.append(f"the best lambda, {strength:g}, is the {end} tried: add {beyond} ones to logistic.l2")
    unconverged = int((~models.converged).sum()) + int((~final.converged).sum())
    if unconverged:
        warnings.append(f"{unconverged} of {len(l2) + 1} fits stopped short of their optimum")
    value = compute_metric(metric, final.compute_logits(test.features)[0], test.labels)
    return ProtocolResult(value, {"lambda": strength}, candidates, warnings)


def evaluate_knn(splits: FeatureSplits, *, metric: str, k: tuple[int, ...]) -> ProtocolResult:
    """Choose the number of neighbours on validation; then neighbours are those of train and validation."""

    def evaluate_ks(bank: LabelledFeatures, queries: LabelledFeatures, ks: tuple[int, ...]) -> list[dict[str, float]]:
        chunks = [v for _, v in iter_knn_votes(bank.features, bank.labels, queries.features, splits.classes, ks=ks)]
        return [
            {"k": k, "value": compute_metric(metric, torch.cat([votes[k] for votes in chunks]), queries.labels)}
            for k in ks
        ]

    candidates = evaluate_ks(splits.train, splits.val, k)
    best_k = int(find_best_candidate(candidates)["k"])
    return ProtocolResult(evaluate_ks(splits.trainval, splits.test, (best_k,))[0]["value"], {"k": best_k}, candidates)


FROZEN_PROTOCOLS: dict[str, Callable[..., ProtocolResult]] = {"logistic": evaluate_logistic, "knn": evaluate_knn}
