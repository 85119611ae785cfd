"""Frozen features judged on another data set: whatever is chosen is chosen on validation; the test is asked once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from relicctl.config.renamed import restore_old_names
from relicctl.config.resolve import ResolvedConfig
from relicctl.config.transfer import TransferConfig
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.core.hardware import pick_precision
from relicctl.encoders.resolve import ResolvedEncoder
from relicctl.errors import UsageError
from relicctl.evaluation.features import FeatureExtractor, compute_encoder_hash, load_or_extract
from relicctl.evaluation.finetune import GridSearch
from relicctl.evaluation.knn import iter_knn_votes
from relicctl.evaluation.labelled_data import LabelledDataset
from relicctl.evaluation.logistic_regression import LogisticModels, fit_logistic_regression
from relicctl.evaluation.metrics import DATASET_METRICS, ProtocolResult, compute_metric, find_best_candidate
from relicctl.evaluation.transfer_data import Split, TransferDataset, open_transfer_dataset, split_trainval
from relicctl.runs.folder import RunFolder
from relicctl.runs.resume import TransferOptions
from relicctl.version import __version__


@dataclass(frozen=True)
class LabelledFeatures:
    """``features`` ``[N, F]``, ``labels`` int64 ``[N]``, or int8 ``[N, C]`` as Tagged has them."""

    features: Tensor
    labels: Tensor

    def select_rows(self, rows: np.ndarray) -> LabelledFeatures:
        picked = torch.from_numpy(rows).to(self.labels.device)
        return LabelledFeatures(self.features[picked], self.labels[picked])

    def get_targets(self, metric: str, classes: int) -> Tensor:
        """For a softmax; or for one-vs-rest where each class is ranked by itself."""
        one_of_many = metric == "map11" and self.labels.ndim == 1
        return one_hot(self.labels, classes).bool() if one_of_many else self.labels


def evaluate_logistic(
    train: LabelledFeatures, val: LabelledFeatures, trainval: LabelledFeatures, test: LabelledFeatures, *,
    metric: str, classes: int,
    l2: tuple[float, ...],
) -> ProtocolResult:  # fmt: skip
    """Of equally good lambdas the middle one is taken; with it the classifier is fitted again to all but the test."""
    models = fit_logistic_regression(
        train.features, train.get_targets(metric, classes), sorted(l2, reverse=True), classes
    )
    scores = [compute_metric(metric, logits, val.labels) for logits in models.compute_logits(val.features)]
    candidates = [{"lambda": strength, "value": value} for strength, value in zip(models.lambdas, scores, strict=True)]
    strength = find_best_candidate(candidates)["lambda"]
    row = models.lambdas.index(strength)
    start = LogisticModels(
        (strength,), models.weight[row, None], models.bias[row, None], models.objective[row, None],
        models.converged[row, None],
    )  # fmt: skip
    final = fit_logistic_regression(
        trainval.features, trainval.get_targets(metric, classes), (strength,), classes, start
    )
    warnings = []
    if len(l2) > 2 and strength in (min(l2), max(l2)):
        end, beyond = ("smallest", "smaller") if strength == min(l2) else ("largest", "larger")
        warnings.append(f"the best lambda, {strength:g}, is the {end} tried: add {beyond} ones to logistic.l2")
    unconverged = int((~models.converged).sum()) + int((~final.converged).sum())
    if unconverged:
        warnings.append(f"{unconverged} of {len(l2) + 1} fits stopped short of their optimum")
    return ProtocolResult(
        compute_metric(metric, final.compute_logits(test.features)[0], test.labels),
        {"lambda": strength},
        candidates,
        warnings,
    )


def evaluate_knn(
    train: LabelledFeatures, val: LabelledFeatures, trainval: LabelledFeatures, test: LabelledFeatures, *,
    metric: str, classes: int,
    k: tuple[int, ...],
) -> ProtocolResult:  # fmt: skip
    """The number of neighbours is chosen on validation; then all but the test are neighbours."""

    def evaluate_ks(
        bank: LabelledFeatures, queries: LabelledFeatures, numbers: tuple[int, ...]
    ) -> list[dict[str, float]]:
        chunks = [v for _, v in iter_knn_votes(bank.features, bank.labels, queries.features, classes, ks=numbers)]
        return [
            {"k": number, "value": compute_metric(metric, torch.cat([v[number] for v in chunks]), queries.labels)}
            for number in numbers
        ]

    candidates = evaluate_ks(train, val, k)
    best_k = int(find_best_candidate(candidates)["k"])
    return ProtocolResult(evaluate_ks(trainval, test, (best_k,))[0]["value"], {"k": best_k}, candidates)


FROZEN_PROTOCOLS: dict[str, Callable[..., ProtocolResult]] = {
    "logistic": evaluate_logistic,
    "knn": evaluate_knn,
}


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder as it looks at images; ``hash`` tells it from any other."""

    name: str
    extractor: FeatureExtractor
    hash: str


# The steps of the recipe.


def open_transfer_datasets(
    config: TransferConfig, options: TransferOptions, console: Console, world: World
) -> list[TransferDataset]:
    def open_datasets() -> list[TransferDataset]:
        data_config = config.data
        return [
            open_transfer_dataset(
                name, spec, download=options.download, warn=console.warn, test=data_config.test_split.get(name, "test"),
                draw=data_config.samples_per_class.get(name, ()), seed=config.seed,
            )
            for name, spec in data_config.datasets.items()
        ]  # fmt: skip

    if options.download and world.size > 1:
        world.broadcast_from_main(lambda: len(open_datasets()))  # one process fetches
    return open_datasets()


def warn_unknown_datasets(resolved: ResolvedConfig, console: Console) -> None:
    """Of what the command line tells of data sets that are none: a slip of the pen would go unseen."""
    data_config = resolved.config.data
    for name, keys in (
        ("metrics", data_config.metrics),
        ("samples_per_class", data_config.samples_per_class),
        ("test_split", data_config.test_split),
    ):
        if resolved.origin[f"data.{name}"] == "--set":
            for unknown in sorted(keys.keys() - data_config.datasets.keys()):
                console.warn(
                    f"data.{name} speaks of {unknown}, which is none of the data ({', '.join(data_config.datasets)})"
                )


def resolve_metric(data: TransferDataset, config: TransferConfig) -> str:
    """Raises UsageError for one that images with any number of classes do not have."""
    metric = config.data.metrics.get(data.name)
    if data.trainval.labels.ndim == 1:
        return metric or DATASET_METRICS.get(data.name, "top1")
    if metric not in (None, "map11"):
        raise UsageError(
            f"{metric} means nothing on {data.name}, whose images have any number of classes.",
            "Take it out of data.metrics: map11 is measured.",
        )
    return "map11"


def check_finetune_batch(division: Split, batch_size: int, world: World) -> None:
    """UsageError if a batch, which takes all images where there are fewer, cannot be split over the processes."""
    for images in (len(division.train), len(division.train) + len(division.val)):
        world.get_local_rows(min(batch_size, images), "finetune.batch_size")


def make_loaded_encoder(
    name: str,
    reference: ResolvedEncoder,
    config: Any,
    device: torch.device,
    run: RunFolder,
    console: Console,
    world: World,
) -> LoadedEncoder:
    extractor = FeatureExtractor(reference.encoder, config, device, run, console, world)
    return LoadedEncoder(name, extractor, compute_encoder_hash(extractor.encoder, extractor.size, extractor.crop_ratio))


def check_unique_encoders(encoders: list[LoadedEncoder]) -> None:
    first_names: dict[str, str] = {}
    for encoder in encoders:
        if encoder.hash in first_names:
            raise UsageError(
                f"{first_names[encoder.hash]} and {encoder.name} are the same encoder.", "Leave one of them out."
            )
        first_names[encoder.hash] = encoder.name


def evaluate_cell(
    encoder: LoadedEncoder,
    data: TransferDataset,
    protocol: str,
    labels: str,
    config: TransferConfig,
    run: RunFolder,
    console: Console,
) -> dict[str, Any]:
    """One figure of the table, from its file if it was finished before; the same on every process."""
    world = encoder.extractor.world
    division = split_trainval(data, labels, config.data.val_fraction, config.seed)
    metric = resolve_metric(data, config)
    settings = getattr(config, protocol).model_dump()
    hashed = restore_old_names("transfer", settings, f"{protocol}.")
    if protocol == "finetune":  # alone in training a network
        hashed["precision"] = pick_precision(config.runtime.precision, encoder.extractor.device)
    key = compute_digest(
        encoder.hash, data.trainval.source.compute_fingerprint(), data.test.source.compute_fingerprint(),
        data.trainval.source.spec,
        division.train.tolist(), division.val.tolist(), protocol, hashed, metric, config.seed, __version__,
    )  # fmt: skip
    path = run.path / "cells" / f"{key}.json"
    title = f"{encoder.name} on {data.name}, {protocol}, {labels} labels"
    finished = world.broadcast_from_main(lambda: json.loads(path.read_text("utf-8")) if path.is_file() else None)
    if finished:
        return finished | {"encoder": encoder.name, "data": data.name, "labels": labels}
    console.info(title)
    if protocol == "finetune":
        grid_search = GridSearch(encoder.extractor, config, run.path / "finetune" / key, run.path, console)
        outcome, images = grid_search(data, division, metric), count_images(division, data)
    else:
        outcome, images = evaluate_frozen(encoder, data, division, protocol, settings, metric, run)
    for text in outcome.warnings:
        console.warn(f"{title}: {text}")
    content = {
        "encoder": encoder.name, "data": data.name, "protocol": protocol, "labels": labels, "metric": metric,
        "value": outcome.value, "chosen": outcome.best_params, "validation": division.val_source,
        "images": images, "warnings": outcome.warnings, "tried": outcome.candidates,
    }  # fmt: skip
    run.write_json(path, content)
    console.info(f"{title}: {metric} {outcome.value:.3f}")
    return content


def evaluate_frozen(
    encoder: LoadedEncoder,
    data: TransferDataset,
    division: Split,
    protocol: str,
    settings: dict[str, Any],
    metric: str,
    run: RunFolder,
) -> tuple[ProtocolResult, dict[str, int]]:
    """By frozen features, without the images that could not be read, and how many were; the main process judges."""
    trainval = load_or_extract_features(encoder, data.trainval, "known", run)
    test = load_or_extract_features(encoder, data.test, "test", run)

    def run_protocol() -> dict[str, Any]:
        assert trainval is not None
        assert test is not None
        examples, rows = trainval
        train, val = (np.flatnonzero(np.isin(rows, part)) for part in (division.train, division.val))
        trainval_rows = np.sort(np.concatenate([train, val]))
        outcome = FROZEN_PROTOCOLS[protocol](
            examples.select_rows(train),
            examples.select_rows(val),
            examples.select_rows(trainval_rows),
            test[0],
            metric=metric,
            classes=len(data.trainval.classes),
            **settings,
        )
        return {
            "outcome": asdict(outcome),
            "images": {"fit": len(train), "validation": len(val), "test": len(test[1])},
        }

    result = encoder.extractor.world.broadcast_from_main(run_protocol)
    return ProtocolResult(**result["outcome"]), result["images"]


def count_images(division: Split, data: TransferDataset) -> dict[str, int]:
    return {"fit": len(division.train), "validation": len(division.val), "test": len(data.test.labels)}


def load_or_extract_features(
    encoder: LoadedEncoder, images: LabelledDataset, part: str, run: RunFolder
) -> tuple[LabelledFeatures, np.ndarray] | None:
    """Of all images that can be read, and their rows in ``images``: for the main process; None for the others."""
    name = compute_digest(encoder.hash, part, images.source.spec, images.source.compute_fingerprint())

    def extract_all() -> tuple[torch.Tensor, np.ndarray]:
        extracted = encoder.extractor(images)
        return extracted.features, extracted.rows

    loaded = load_or_extract(
        run.path / "features" / f"{name}.safetensors", encoder.extractor.device, extract_all, encoder.extractor.world
    )
    if loaded is None:
        return None
    features, rows = loaded
    return LabelledFeatures(features, torch.from_numpy(images.labels[rows]).to(features.device)), rows


def format_sampling_notes(config: TransferConfig) -> list[str]:
    """Of data without splits, what says that a figure is of our draw and of no published list."""
    return [
        f"{name}: {train} images of each class to learn from and {test[0] if test else 'all others'} to test on, "
        f"drawn by seed {config.seed}"
        for name, (train, *test) in config.data.samples_per_class.items()
        if name in config.data.datasets
    ]


def make_data_record(data: TransferDataset, config: TransferConfig) -> dict[str, Any]:
    val = len(data.trainval.labels) - data.num_train
    return {
        "source": config.data.datasets[data.name], "classes": len(data.trainval.classes),
        "train": data.num_train, "val": val or None, "test": len(data.test.labels),
        "draw": config.data.samples_per_class.get(data.name),
    }  # fmt: skip


def compute_digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
