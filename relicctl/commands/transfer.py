"""``relicctl transfer``: do an encoder's features serve other data sets, and better than another encoder's?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import yaml

from relicctl import __version__
from relicctl.commands.common import pick_device
from relicctl.commands.linear_study import Look
from relicctl.commands.options import TransferOptions
from relicctl.commands.transfer_job import Job, noted, open_all, open_folder, settle, text_of
from relicctl.commands.transfer_tuning import Tuner
from relicctl.config.resolve import Resolved, dump_yaml
from relicctl.config.transfer import TransferConfig
from relicctl.console import Console
from relicctl.errors import UsageError
from relicctl.evaluation import chart, protocols
from relicctl.evaluation.kept import encoder_hash, kept
from relicctl.evaluation.labelled import Labelled
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
    console = Console(options.quiet)
    job, resolved, out = settle(resolved, options)
    references = open_all(job, resolved.config, console)
    config: TransferConfig = resolved.config
    device = pick_device(config.runtime.device)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    sets = [
        open_data_set(name, spec, download=options.download, warn=console.warn)
        for name, spec in config.data.sets.items()
    ]
    for labels in map(text_of, config.labels):  # before anything is computed
        for data in sets:
            divide(data, labels, config.data.holdout, config.seed)
    with closing(open_folder(out, options, config)) as run:
        run.write_text(run.config, dump_yaml(config) + yaml.safe_dump({"run": noted(job)}, sort_keys=False))
        seers = [see(n, r, config, device, run, console) for n, r in zip(job.encoders, references, strict=True)]
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
        tell(cells, job, run, console)
    return {"run": str(run.path), **results}


def dry_run(resolved: Resolved, options: TransferOptions) -> str:
    """The resolved config and where each value comes from."""
    resolved = settle(resolved, options)[1]
    return dump_yaml(resolved.config, resolved.origin).rstrip()


# The steps of the recipe.


def see(name: str, reference: Reference, config: Any, device: torch.device, run: RunFolder, console: Console) -> Seer:
    look = Look(reference.encoder, config, device, run, console)
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
    """One figure of the table, from its file if it was finished before."""
    division = divide(data, labels, config.data.holdout, config.seed)
    metric = config.data.metrics.get(data.name) or OF_DATA.get(data.name, "top1")
    settings = getattr(config, protocol).model_dump()
    key = digest(
        seer.hash, data.known.source.fingerprint(), data.test.source.fingerprint(), data.known.source.spec,
        division.fit.tolist(), division.chosen_on.tolist(), protocol, settings, metric, config.seed, __version__,
    )  # fmt: skip
    path = run.path / "cells" / f"{key}.json"
    title = f"{seer.name} on {data.name}, {protocol}, {labels} labels"
    if path.is_file():
        return json.loads(path.read_text("utf-8")) | {"encoder": seer.name, "data": data.name, "labels": labels}
    console.note(title)
    if protocol == "finetune":
        tuner = Tuner(seer.look, config, run.path / "finetune" / key, f"relicctl transfer --resume {run.path}", console)
        outcome = tuner(data, division, metric)
    else:
        outcome = judged(seer, data, division, protocol, settings, metric, run)
    for text in outcome.warnings:
        console.warn(f"{title}: {text}")
    content = {
        "encoder": seer.name, "data": data.name, "protocol": protocol, "labels": labels, "metric": metric,
        "value": outcome.value, "chosen": outcome.chosen, "validation": division.validation,
        "images": {"fit": len(division.fit), "validation": len(division.chosen_on), "test": len(data.test.labels)},
        "warnings": outcome.warnings, "tried": outcome.tried,
    }  # fmt: skip
    run.write_json(path, content)
    console.note(f"{title}: {metric} {outcome.value:.3f}")
    return content


def judged(
    seer: Seer, data: DataSet, division: Division, protocol: str, settings: dict[str, Any], metric: str, run: RunFolder
) -> Outcome:
    """By frozen features, without the images that could not be read."""
    known, rows = features(seer, data.known, "known", run)
    test, _ = features(seer, data.test, "test", run)
    fit, chosen_on = (np.flatnonzero(np.isin(rows, part)) for part in (division.fit, division.chosen_on))
    both = np.sort(np.concatenate([fit, chosen_on]))
    return JUDGES[protocol](
        known.at(fit),
        known.at(chosen_on),
        known.at(both),
        test,
        metric=metric,
        classes=len(data.known.classes),
        **settings,
    )


def features(seer: Seer, images: Labelled, part: str, run: RunFolder) -> tuple[Examples, np.ndarray]:
    """Of all images that can be read, and their rows in ``images``."""
    name = digest(seer.hash, part, images.source.spec, images.source.fingerprint())

    def make() -> tuple[torch.Tensor, np.ndarray]:
        seen = seer.look(images)
        return seen.features, seen.rows

    found, rows = kept(run.path / "features" / f"{name}.safetensors", seer.look.device, make)
    return Examples(found, torch.from_numpy(images.labels[rows]).to(found.device)), rows


def tell(cells: list[dict[str, Any]], job: Job, run: RunFolder, console: Console) -> None:
    """The table on stderr and as table.md, and the chart."""
    header, rows = chart.table(cells, job.encoders, job.baselines)
    console.note("")
    console.table(header, rows)
    names = chart.short_names(job.encoders)
    notes = [f"{names[name]} = {name}" for name in job.encoders if names[name] != name]
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
    }  # fmt: skip


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
