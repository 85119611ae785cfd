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
from relicctl.commands.processes import joined
from relicctl.commands.transfer_job import Job, continued, noted, open_all, open_folder, resumable, settle, text_of
from relicctl.commands.transfer_tuning import Tuner
from relicctl.config.resolve import Resolved, dump_yaml
from relicctl.config.transfer import TransferConfig
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.core.hardware import pick_precision
from relicctl.errors import UsageError
from relicctl.evaluation import chart, protocols
from relicctl.evaluation.kept import encoder_hash, kept
from relicctl.evaluation.labelled import Labelled
from relicctl.evaluation.look import Look
from relicctl.evaluation.metrics import OF_DATA
from relicctl.evaluation.parts import DataSet, Division, divide, open_data_set
from relicctl.evaluation.protocols import Examples, Outcome
from relicctl.reference import Reference
from relicctl.runs import RunFolder

JUDGES: dict[str, Callable[..., Outcome]] = {"logistic": protocols.logistic, "knn": protocols.knn}


@dataclass(frozen=True)
class Seer:
    """An encoder as it looks at images; ``hash`` tells it from any other."""

    name: str
    look: Look
    hash: str


def transfer(resolved: Resolved, options: TransferOptions) -> dict[str, Any]:
    """Run or resume a comparison; returns ``run`` (the folder of results) and the content of results.json."""
    resolved = continued(resolved, options)
    with joined(resolved.config.runtime, options.quiet) as (world, device, console):
        warn_of_strangers(resolved, console)
        return _run(resolved.config, options, device, console, world)


def _run(
    config: TransferConfig, options: TransferOptions, device: torch.device, console: Console, world: World
) -> dict[str, Any]:
    job, out = settle(config, options, world)
    references = open_all(job, config, console)
    sets = open_sets(config, options, console, world)
    for data in sets:
        metric_of(data, config)
    for labels in map(text_of, config.labels):  # before anything is computed
        for data in sets:
            division = divide(data, labels, config.data.holdout, config.seed)
            if "finetune" in config.protocol:
                refuse_uneven(division, config.finetune.batch_size, world)
    with resumable(open_folder(out, options, config, world)) as run:
        run.write_text(run.config, dump_yaml(config) + yaml.safe_dump({"run": noted(job)}, sort_keys=False))
        seers = [see(n, r, config, device, run, console, world) for n, r in zip(job.encoders, references, strict=True)]
        refuse_twins(seers)
        cells = [
            cell(seer, data, protocol, labels, config, run, console)
            for data in sets
            for protocol in config.protocol
            for labels in map(text_of, config.labels)
            for seer in seers
        ]
        results = {
            "cells": cells,
            "relative": chart.improvements(cells, job.encoders, job.baselines),
            "encoders": {
                s.name: {"sha256": s.hash, "size": s.look.size, "crop_ratio": s.look.crop_ratio} for s in seers
            },
            "baselines": list(job.baselines),
            "data": {data.name: facts(data, config) for data in sets},
            "version": __version__,
        }
        run.write_json(run.results, results)
        if world.is_main:
            tell(cells, job, run, console, draws(config))
    return {"run": str(run.path), **results}


def dry_run(resolved: Resolved, options: TransferOptions) -> str:
    """The resolved config and where each value comes from."""
    resolved = continued(resolved, options)
    settle(resolved.config, options, World())
    return dump_yaml(resolved.config, resolved.origin).rstrip()


# The steps of the recipe.


def open_sets(config: TransferConfig, options: TransferOptions, console: Console, world: World) -> list[DataSet]:
    def opened() -> list[DataSet]:
        told = config.data
        return [
            open_data_set(
                name, spec, download=options.download, warn=console.warn, test=told.test_split.get(name, "test"),
                draw=told.draw.get(name, ()), seed=config.seed,
            )
            for name, spec in told.sets.items()
        ]  # fmt: skip

    if options.download and world.size > 1:
        world.lead(lambda: len(opened()))  # one process fetches
    return opened()


def warn_of_strangers(resolved: Resolved, console: Console) -> None:
    """Of what the command line tells of data sets that are none: a slip of the pen would go unseen."""
    told = resolved.config.data
    for name, keys in (("metrics", told.metrics), ("draw", told.draw), ("test_split", told.test_split)):
        if resolved.origin[f"data.{name}"] == "--set":
            for stranger in sorted(keys.keys() - told.sets.keys()):
                console.warn(f"data.{name} speaks of {stranger}, which is none of the data ({', '.join(told.sets)})")


def metric_of(data: DataSet, config: TransferConfig) -> str:
    """Raises UsageError for one that images with any number of classes do not have."""
    told = config.data.metrics.get(data.name)
    if data.known.labels.ndim == 1:
        return told or OF_DATA.get(data.name, "top1")
    if told not in (None, "map11"):
        raise UsageError(
            f"{told} means nothing on {data.name}, whose images have any number of classes.",
            "Take it out of data.metrics: map11 is measured.",
        )
    return "map11"


def refuse_uneven(division: Division, batch_size: int, world: World) -> None:
    """UsageError if a batch, which takes all images where there are fewer, cannot be split over the processes."""
    for images in (len(division.fit), len(division.fit) + len(division.chosen_on)):
        world.rows(min(batch_size, images), "finetune.batch_size")


def see(
    name: str, reference: Reference, config: Any, device: torch.device, run: RunFolder, console: Console, world: World
) -> Seer:
    look = Look(reference.encoder, config, device, run, console, world)
    return Seer(name, look, encoder_hash(look.encoder, look.size, look.crop_ratio))


def refuse_twins(seers: list[Seer]) -> None:
    first: dict[str, str] = {}
    for seer in seers:
        if seer.hash in first:
            raise UsageError(f"{first[seer.hash]} and {seer.name} are the same encoder.", "Leave one of them out.")
        first[seer.hash] = seer.name


def cell(
    seer: Seer, data: DataSet, protocol: str, labels: str, config: TransferConfig, run: RunFolder, console: Console
) -> dict[str, Any]:
    """One figure of the table, from its file if it was finished before; the same on every process."""
    world = seer.look.world
    division = divide(data, labels, config.data.holdout, config.seed)
    metric = metric_of(data, config)
    settings = getattr(config, protocol).model_dump()
    if protocol == "finetune":  # alone in training a network
        settings["precision"] = pick_precision(config.runtime.precision, seer.look.device)
    key = digest(
        seer.hash, data.known.source.fingerprint(), data.test.source.fingerprint(), data.known.source.spec,
        division.fit.tolist(), division.chosen_on.tolist(), protocol, settings, metric, config.seed, __version__,
    )  # fmt: skip
    path = run.path / "cells" / f"{key}.json"
    title = f"{seer.name} on {data.name}, {protocol}, {labels} labels"
    finished = world.lead(lambda: json.loads(path.read_text("utf-8")) if path.is_file() else None)
    if finished:
        return finished | {"encoder": seer.name, "data": data.name, "labels": labels}
    console.note(title)
    if protocol == "finetune":
        tuner = Tuner(seer.look, config, run.path / "finetune" / key, run.path, console)
        outcome, images = tuner(data, division, metric), counts_of(division, data)
    else:
        outcome, images = judged(seer, data, division, protocol, settings, metric, run)
    for text in outcome.warnings:
        console.warn(f"{title}: {text}")
    content = {
        "encoder": seer.name, "data": data.name, "protocol": protocol, "labels": labels, "metric": metric,
        "value": outcome.value, "chosen": outcome.chosen, "validation": division.validation,
        "images": images, "warnings": outcome.warnings, "tried": outcome.tried,
    }  # fmt: skip
    run.write_json(path, content)
    console.note(f"{title}: {metric} {outcome.value:.3f}")
    return content


def judged(
    seer: Seer, data: DataSet, division: Division, protocol: str, settings: dict[str, Any], metric: str, run: RunFolder
) -> tuple[Outcome, dict[str, int]]:
    """By frozen features, without the images that could not be read, and how many were; the main process judges."""
    known = features(seer, data.known, "known", run)
    test = features(seer, data.test, "test", run)

    def judge() -> dict[str, Any]:
        assert known is not None
        assert test is not None
        examples, rows = known
        fit, chosen_on = (np.flatnonzero(np.isin(rows, part)) for part in (division.fit, division.chosen_on))
        both = np.sort(np.concatenate([fit, chosen_on]))
        outcome = JUDGES[protocol](
            examples.at(fit),
            examples.at(chosen_on),
            examples.at(both),
            test[0],
            metric=metric,
            classes=len(data.known.classes),
            **settings,
        )
        return {
            "outcome": asdict(outcome),
            "images": {"fit": len(fit), "validation": len(chosen_on), "test": len(test[1])},
        }

    told = seer.look.world.lead(judge)
    return Outcome(**told["outcome"]), told["images"]


def counts_of(division: Division, data: DataSet) -> dict[str, int]:
    return {"fit": len(division.fit), "validation": len(division.chosen_on), "test": len(data.test.labels)}


def features(seer: Seer, images: Labelled, part: str, run: RunFolder) -> tuple[Examples, np.ndarray] | None:
    """Of all images that can be read, and their rows in ``images``: for the main process; None for the others."""
    name = digest(seer.hash, part, images.source.spec, images.source.fingerprint())

    def make() -> tuple[torch.Tensor, np.ndarray]:
        seen = seer.look(images)
        return seen.features, seen.rows

    found = kept(run.path / "features" / f"{name}.safetensors", seer.look.device, make, seer.look.world)
    if found is None:
        return None
    features, rows = found
    return Examples(features, torch.from_numpy(images.labels[rows]).to(features.device)), rows


def draws(config: TransferConfig) -> list[str]:
    """Of data without splits, what says that a figure is of our draw and of no published list."""
    return [
        f"{name}: {train} images of each class to learn from and {test[0] if test else 'all others'} to test on, "
        f"drawn by seed {config.seed}"
        for name, (train, *test) in config.data.draw.items()
        if name in config.data.sets
    ]


def tell(cells: list[dict[str, Any]], job: Job, run: RunFolder, console: Console, notes: list[str]) -> None:
    """The table on stderr and as table.md with ``notes`` and more, and the chart."""
    header, rows = chart.table(cells, job.encoders, job.baselines)
    console.note("")
    console.table(header, rows)
    names = chart.short_names(job.encoders)
    notes = notes + [f"{names[name]} = {name}" for name in job.encoders if names[name] != name]
    notes += list(dict.fromkeys(f"{c['data']}, {c['labels']} labels: chosen on {c['validation']}" for c in cells))
    notes += [
        f"{c['encoder']} on {c['data']}, {c['protocol']}, {c['labels']} labels: {text}"
        for c in cells
        for text in c["warnings"]
    ]
    run.write_text(run.path / "table.md", chart.markdown(header, rows, notes))
    chart.draw(run.path / "chart.png", cells, job.encoders, job.baselines)


def facts(data: DataSet, config: TransferConfig) -> dict[str, Any]:
    val = len(data.known.labels) - data.trained
    return {
        "source": config.data.sets[data.name], "classes": len(data.known.classes),
        "train": data.trained, "val": val or None, "test": len(data.test.labels),
        "draw": config.data.draw.get(data.name),
    }  # fmt: skip


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
