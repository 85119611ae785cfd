"""``relicctl linear-eval``: how good frozen features are for a linear classifier and for nearest neighbours."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from relicctl import __version__
from relicctl.commands.linear_job import Job, continued, open_folder, run_record, settle
from relicctl.commands.linear_study import Study
from relicctl.commands.options import LinearOptions
from relicctl.commands.processes import joined
from relicctl.config.linear import LinearConfig
from relicctl.config.resolve import Resolved, dump_yaml
from relicctl.console import Console
from relicctl.core import checkpoint
from relicctl.core.counted import Stream
from relicctl.core.distributed import World
from relicctl.data.sources import open_source
from relicctl.evaluation import analysis, report
from relicctl.evaluation.during import shuffled
from relicctl.evaluation.knn import TEMPERATURE, knn_accuracy
from relicctl.evaluation.labelled import Labelled, match, open_labelled
from relicctl.evaluation.linear import Linear
from relicctl.evaluation.look import Look, Seen
from relicctl.evaluation.report import Scores
from relicctl.reference import Reference
from relicctl.runs import RunFolder


def linear_eval(ask: Callable[..., Resolved], options: LinearOptions) -> dict[str, Any]:
    """Run or resume a linear evaluation; returns ``run`` (the folder of results) and the content of results.json.

    ``ask(base=...)`` resolves the config on top of what an encoder's run says.
    """
    resolved = continued(ask(), options)  # wrong keys are refused before anything is opened
    with joined(resolved.config.runtime, options.quiet) as (world, device, console):
        return _run(ask, resolved, options, device, console, world)


def _run(
    ask: Callable[..., Resolved],
    resolved: Resolved,
    options: LinearOptions,
    device: torch.device,
    console: Console,
    world: World,
) -> dict[str, Any]:
    job, resolved, references, out = settle(ask, resolved, options, console, world)
    config: LinearConfig = resolved.config
    if config.protocol == "imagenet":
        world.rows(config.optim.batch_size)  # before anything is computed
    train_images, test_images, tests = open_images(config, job, options, console, world)
    run = open_folder(out, world, resumed=options.resume is not None, overwrite=options.overwrite, config=config)
    record = world.lead(lambda: run_record(run, config, job, train_images, device))
    look = Look(references[0].encoder, config, device, run, console, world)
    started = time.perf_counter()
    known, asked = look(train_images), look(test_images)
    seconds = {"features": time.perf_counter() - started}

    study = Study(config, train_images, known, look, record, run, console)
    choice, rate = None, config.sweep.rates[0]
    if len(config.sweep.rates) > 1:
        started = time.perf_counter()
        choice = study.sweep()
        rate = choice.rate
        seconds["sweep"] = time.perf_counter() - started
    started = time.perf_counter()
    classifiers, standard = study.fit(run, np.arange(len(known.labels)), (rate,))
    seconds["fit"] = time.perf_counter() - started
    linear = classifiers.linear(0)
    if standard is not None:
        linear = standard.folded(linear)

    further = {name: look(images) for name, images in tests.items()}
    results: dict[str, Any] = {}
    if world.is_main:
        scores = Scores.of(linear(asked.features), asked.labels)
        neighbours = knn_accuracy(known.features, known.labels, asked.features, asked.labels)
        metadata: Any = references[0].encoder.metadata
        results = {
            **scores.figures(),
            **{f"knn{k}": share for k, share in neighbours.items()},
            "sweep": choice.record() if choice else None,
            "per_class": scores.classes(train_images.classes),
            "tests": {name: score_further(tests[name], seen, linear) for name, seen in further.items()},
            "protocol": protocol(config, study, rate, known, asked, look),
            "encoder": {"source": job.sources[0], "network": job.network, **dict(sorted(metadata.items()))},
            "confusion": scores.confusion.tolist(),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "version": __version__,
        }
        save_classifier(run.path / "classifier.safetensors", linear, train_images.classes)
        run.write_json(run.results, results)
        title = f"{job.sources[0]}: top-1 {scores.top1:.3f} on {len(asked.labels)} images"
        report.draw(run.path / "linear.png", scores, train_images.classes, choice, title)
        report.tell(results, console)
        if choice and (text := choice.warning()):
            console.warn(text)
    if job.analysis:
        analyse_all(references, job, config, test_images, device, run, console, world)
    run.close()
    return {"run": str(run.path), **results}


def dry_run(ask: Callable[..., Resolved], options: LinearOptions) -> str:
    """The resolved config and where each value comes from."""
    resolved = continued(ask(), options)
    resolved = settle(ask, resolved, options, Console(options.quiet), World())[1]
    return dump_yaml(resolved.config, resolved.origin).rstrip()


def open_images(
    config: LinearConfig, job: Job, options: LinearOptions, console: Console, world: World
) -> tuple[Labelled, Labelled, dict[str, Labelled]]:
    """The images to train on, those to test on, and further test sets by name."""

    def opened() -> tuple[Labelled, Labelled, dict[str, Labelled]]:
        train, test = open_labelled(config, options.download, console)
        further = {
            name: match(open_source(spec, split="val", download=options.download), train.classes)
            for name, spec in job.tests.items()
        }
        return train, test, further

    if options.download and world.size > 1:
        world.lead(lambda: len(opened()))  # one process fetches
    return opened()


def score_further(images: Labelled, seen: Seen, linear: Linear) -> dict[str, Any]:
    """The same classifier on other images of its classes."""
    scores = Scores.of(linear(seen.features), seen.labels)
    return {
        **scores.figures(),
        "data": images.source.spec,
        "images": len(seen.labels),
        "missing_classes": list(images.missing),
        "unknown_classes": list(images.foreign),
        "per_class": scores.classes(images.classes),
    }


def protocol(config: LinearConfig, study: Study, rate: float, known: Seen, asked: Seen, look: Look) -> dict[str, Any]:
    fast = config.protocol == "fast"
    return {
        "form": config.protocol,
        "features": "centre crops, standardised" if fast else "random crops and flips, as they are",
        "optimiser": f"SGD, Nesterov momentum {config.optim.momentum:g}, cosine to 0, no weight decay",
        "rate_per_256": rate,
        "rate_chosen_on": f"{study.held_out} held-out training images" if study.held_out else "not chosen",
        "batch_size": study.batch_size,
        "epochs": config.optim.epochs,
        "max_steps": config.optim.max_steps,
        "train": config.data.train,
        "train_images": len(known.labels),
        "test": config.data.val or f"held-out share {config.eval.holdout:g} of {config.data.train}",
        "test_images": len(asked.labels),
        "size": look.size,
        "crop_ratio": look.crop_ratio,
        "knn": f"cosine, weights exp(similarity / {TEMPERATURE}), all training images",
    }


def save_classifier(path: Path, linear: Linear, classes: tuple[str, ...]) -> None:
    tensors = {"weight": linear.weight.cpu().contiguous(), "bias": linear.bias.cpu().contiguous()}
    metadata = {"format": "relicctl-classifier", "version": __version__, "classes": json.dumps(classes)}
    checkpoint.atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def analyse_all(
    references: list[Reference],
    job: Job,
    config: LinearConfig,
    test: Labelled,
    device: torch.device,
    run: RunFolder,
    console: Console,
    world: World,
) -> None:
    """analysis.json and analysis.png of all encoders, on the same test images."""
    rows = np.sort(shuffled(len(test.source), config.seed, Stream.EVAL)[: config.analysis.images])
    some = Labelled(test.source.select(rows), test.labels[rows], test.classes)
    found, labels = {}, test.labels[rows]
    for source, reference in zip(job.sources, references, strict=True):
        seen = Look(reference.encoder, config, device, run, console, world)(some)
        labels = seen.labels.cpu().numpy()
        if world.is_main:
            found[source] = analysis.analyse(seen.features, seen.labels, len(test.classes), config.seed)
    if not world.is_main:
        return
    records = {source: clusters.record(test.classes, labels) for source, clusters in found.items()}
    run.write_json(run.path / "analysis.json", records)
    analysis.draw(run.path / "analysis.png", found, test.classes, labels)
    console.note("")
    console.table(
        [f"clusters of {len(labels)} images", "discriminant ratio", "distance to 5 nearest"],
        [[source, r["discriminant_ratio"], r["neighbour_distance"]] for source, r in records.items()],
    )
