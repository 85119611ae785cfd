"""``relicctl transfer``: do an encoder's features serve other data sets, and better than another encoder's?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import yaml

from relicctl import __version__
from relicctl.commands.options import TransferOptions
from relicctl.commands.processes import open_distributed_session
from relicctl.commands.transfer_job import (
    TransferJob,
    close_with_resume_hint,
    format_labels,
    make_transfer_record,
    open_encoders,
    open_transfer_folder,
    resolve_transfer_job,
    resume_transfer_config,
)
from relicctl.commands.transfer_tuning import GridSearch
from relicctl.config.resolve import ResolvedConfig, dump_yaml
from relicctl.config.transfer import TransferConfig
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.core.hardware import pick_precision
from relicctl.errors import UsageError
from relicctl.evaluation import chart, protocols
from relicctl.evaluation.kept import compute_encoder_hash, load_or_extract
from relicctl.evaluation.labelled import LabelledDataset
from relicctl.evaluation.look import FeatureExtractor
from relicctl.evaluation.metrics import DATASET_METRICS
from relicctl.evaluation.parts import Split, TransferDataset, open_transfer_dataset, split_trainval
from relicctl.evaluation.protocols import LabelledFeatures, ProtocolResult
from relicctl.reference import ResolvedEncoder
from relicctl.runs import RunFolder

FROZEN_PROTOCOLS: dict[str, Callable[..., ProtocolResult]] = {
    "logistic": protocols.evaluate_logistic,
    "knn": protocols.evaluate_knn,
}


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder as it looks at images; ``hash`` tells it from any other."""

    name: str
    extractor: FeatureExtractor
    hash: str


def transfer(resolved: ResolvedConfig, options: TransferOptions) -> dict[str, Any]:
    """Run or resume a comparison; returns ``run`` (the folder of results) and the content of results.json."""
    resolved = resume_transfer_config(resolved, options)
    with open_distributed_session(resolved.config.runtime, options.quiet) as (world, device, console):
        warn_unknown_datasets(resolved, console)
        return _run_transfer(resolved.config, options, device, console, world)


def _run_transfer(
    config: TransferConfig, options: TransferOptions, device: torch.device, console: Console, world: World
) -> dict[str, Any]:
    job, out = resolve_transfer_job(config, options, world)
    references = open_encoders(job, config, console)
    sets = open_transfer_datasets(config, options, console, world)
    for data in sets:
        resolve_metric(data, config)
    for labels in map(format_labels, config.labels):  # before anything is computed
        for data in sets:
            division = split_trainval(data, labels, config.data.holdout, config.seed)
            if "finetune" in config.protocol:
                check_finetune_batch(division, config.finetune.batch_size, world)
    with close_with_resume_hint(open_transfer_folder(out, options, config, world)) as run:
        run.write_text(
            run.config_path, dump_yaml(config) + yaml.safe_dump({"run": make_transfer_record(job)}, sort_keys=False)
        )
        encoders = [
            make_loaded_encoder(n, r, config, device, run, console, world)
            for n, r in zip(job.encoders, references, strict=True)
        ]
        check_unique_encoders(encoders)
        cells = [
            evaluate_cell(seer, data, protocol, labels, config, run, console)
            for data in sets
            for protocol in config.protocol
            for labels in map(format_labels, config.labels)
            for seer in encoders
        ]
        results = {
            "cells": cells,
            "relative": chart.list_relative_improvements(cells, job.encoders, job.baselines),
            "encoders": {
                s.name: {"sha256": s.hash, "size": s.extractor.size, "crop_ratio": s.extractor.crop_ratio}
                for s in encoders
            },
            "baselines": list(job.baselines),
            "data": {data.name: make_data_record(data, config) for data in sets},
            "version": __version__,
        }
        run.write_json(run.results_path, results)
        if world.is_main:
            report_transfer(cells, job, run, console, format_sampling_notes(config))
    return {"run": str(run.path), **results}


def format_transfer_dry_run(resolved: ResolvedConfig, options: TransferOptions) -> str:
    """The resolved config and where each value comes from."""
    resolved = resume_transfer_config(resolved, options)
    resolve_transfer_job(resolved.config, options, World())
    return dump_yaml(resolved.config, resolved.origin).rstrip()


# The steps of the recipe.


def open_transfer_datasets(
    config: TransferConfig, options: TransferOptions, console: Console, world: World
) -> list[TransferDataset]:
    def open_datasets() -> list[TransferDataset]:
        data_config = config.data
        return [
            open_transfer_dataset(
                name, spec, download=options.download, warn=console.warn, test=data_config.test_split.get(name, "test"),
                draw=data_config.draw.get(name, ()), seed=config.seed,
            )
            for name, spec in data_config.sets.items()
        ]  # fmt: skip

    if options.download and world.size > 1:
        world.broadcast_from_main(lambda: len(open_datasets()))  # one process fetches
    return open_datasets()


def warn_unknown_datasets(resolved: ResolvedConfig, console: Console) -> None:
    """Of what the command line tells of data sets that are none: a slip of the pen would go unseen."""
    data_config = resolved.config.data
    for name, keys in (
        ("metrics", data_config.metrics),
        ("draw", data_config.draw),
        ("test_split", data_config.test_split),
    ):
        if resolved.origin[f"data.{name}"] == "--set":
            for unknown in sorted(keys.keys() - data_config.sets.keys()):
                console.warn(
                    f"data.{name} speaks of {unknown}, which is none of the data ({', '.join(data_config.sets)})"
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
    division = split_trainval(data, labels, config.data.holdout, config.seed)
    metric = resolve_metric(data, config)
    settings = getattr(config, protocol).model_dump()
    if protocol == "finetune":  # alone in training a network
        settings["precision"] = pick_precision(config.runtime.precision, encoder.extractor.device)
    key = compute_digest(
        encoder.hash, data.trainval.source.compute_fingerprint(), data.test.source.compute_fingerprint(),
        data.trainval.source.spec,
        division.train.tolist(), division.val.tolist(), protocol, settings, metric, config.seed, __version__,
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
        for name, (train, *test) in config.data.draw.items()
        if name in config.data.sets
    ]


def report_transfer(
    cells: list[dict[str, Any]], job: TransferJob, run: RunFolder, console: Console, notes: list[str]
) -> None:
    """The table on stderr and as table.md with ``notes`` and more, and the chart."""
    header, rows = chart.build_transfer_table(cells, job.encoders, job.baselines)
    console.info("")
    console.print_table(header, rows)
    names = chart.shorten_encoder_names(job.encoders)
    notes = notes + [f"{names[name]} = {name}" for name in job.encoders if names[name] != name]
    notes += list(dict.fromkeys(f"{c['data']}, {c['labels']} labels: chosen on {c['validation']}" for c in cells))
    notes += [
        f"{c['encoder']} on {c['data']}, {c['protocol']}, {c['labels']} labels: {text}"
        for c in cells
        for text in c["warnings"]
    ]
    run.write_text(run.path / "table.md", chart.format_markdown(header, rows, notes))
    chart.plot_transfer_chart(run.path / "chart.png", cells, job.encoders, job.baselines)


def make_data_record(data: TransferDataset, config: TransferConfig) -> dict[str, Any]:
    val = len(data.trainval.labels) - data.num_train
    return {
        "source": config.data.sets[data.name], "classes": len(data.trainval.classes),
        "train": data.num_train, "val": val or None, "test": len(data.test.labels),
        "draw": config.data.draw.get(data.name),
    }  # fmt: skip


def compute_digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
