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
from relicctl.commands.linear_job import (
    LinearJob,
    open_linear_folder,
    resolve_linear_job,
    resume_linear_config,
    save_linear_record,
)
from relicctl.commands.linear_study import LinearTrainer
from relicctl.commands.options import LinearOptions
from relicctl.commands.processes import open_distributed_session
from relicctl.config.linear import LinearEvalConfig
from relicctl.config.resolve import ResolvedConfig, dump_yaml
from relicctl.console import Console
from relicctl.core import checkpoint
from relicctl.core.counted import Stream
from relicctl.core.distributed import World
from relicctl.data.sources import open_dataset
from relicctl.evaluation import analysis, report
from relicctl.evaluation.during import permutation
from relicctl.evaluation.knn import TEMPERATURE, compute_knn_accuracy
from relicctl.evaluation.labelled import LabelledDataset, match_classes, open_train_test
from relicctl.evaluation.linear import LinearClassifier
from relicctl.evaluation.look import ExtractedFeatures, FeatureExtractor
from relicctl.evaluation.report import ClassificationMetrics
from relicctl.reference import ResolvedEncoder
from relicctl.runs import RunFolder


def linear_eval(resolve_config: Callable[..., ResolvedConfig], options: LinearOptions) -> dict[str, Any]:
    """Run or resume a linear evaluation; returns ``run`` (the folder of results) and the content of results.json.

    ``ask(base=...)`` resolves the config on top of what an encoder's run says.
    """
    resolved = resume_linear_config(resolve_config(), options)  # wrong keys are refused before anything is opened
    with open_distributed_session(resolved.config.runtime, options.quiet) as (world, device, console):
        return _run_linear_eval(resolve_config, resolved, options, device, console, world)


def _run_linear_eval(
    resolve_config: Callable[..., ResolvedConfig],
    resolved: ResolvedConfig,
    options: LinearOptions,
    device: torch.device,
    console: Console,
    world: World,
) -> dict[str, Any]:
    job, resolved, references, out = resolve_linear_job(resolve_config, resolved, options, console, world)
    config: LinearEvalConfig = resolved.config
    if config.protocol == "imagenet":
        world.get_local_rows(config.optim.batch_size)  # before anything is computed
    train_images, test_images, tests = open_linear_data(config, job, options, console, world)
    run = open_linear_folder(out, world, resumed=options.resume is not None, overwrite=options.overwrite, config=config)
    record = world.broadcast_from_main(lambda: save_linear_record(run, config, job, train_images, device))
    extractor = FeatureExtractor(references[0].encoder, config, device, run, console, world)
    started = time.perf_counter()
    train_features, test_features = extractor(train_images), extractor(test_images)
    seconds = {"features": time.perf_counter() - started}

    trainer = LinearTrainer(config, train_images, train_features, extractor, record, run, console)
    choice, rate = None, config.sweep.rates[0]
    if len(config.sweep.rates) > 1:
        started = time.perf_counter()
        choice = trainer.sweep_rates()
        rate = choice.best_rate
        seconds["sweep"] = time.perf_counter() - started
    started = time.perf_counter()
    classifiers, standard = trainer.fit(run, np.arange(len(train_features.labels)), (rate,))
    seconds["fit"] = time.perf_counter() - started
    linear = classifiers.get_classifier(0)
    if standard is not None:
        linear = standard.fold_into(linear)

    extra_features = {name: extractor(images) for name, images in tests.items()}
    results: dict[str, Any] = {}
    if world.is_main:
        scores = ClassificationMetrics.from_logits(linear(test_features.features), test_features.labels)
        neighbours = compute_knn_accuracy(
            train_features.features, train_features.labels, test_features.features, test_features.labels
        )
        metadata: Any = references[0].encoder.metadata
        results = {
            **scores.to_dict(),
            **{f"knn{k}": share for k, share in neighbours.items()},
            "sweep": choice.to_dict() if choice else None,
            "per_class": scores.get_class_metrics(train_images.classes),
            "tests": {name: evaluate_test_set(tests[name], seen, linear) for name, seen in extra_features.items()},
            "protocol": make_protocol_record(config, trainer, rate, train_features, test_features, extractor),
            "encoder": {"source": job.sources[0], "network": job.network, **dict(sorted(metadata.items()))},
            "confusion": scores.confusion.tolist(),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "version": __version__,
        }
        save_classifier(run.path / "classifier.safetensors", linear, train_images.classes)
        run.write_json(run.results_path, results)
        title = f"{job.sources[0]}: top-1 {scores.top1:.3f} on {len(test_features.labels)} images"
        report.plot_linear_results(run.path / "linear.png", scores, train_images.classes, choice, title)
        report.print_linear_results(results, console)
        if choice and (text := choice.get_warning()):
            console.warn(text)
    if job.analysis:
        run_cluster_analysis(references, job, config, test_images, device, run, console, world)
    run.close()
    return {"run": str(run.path), **results}


def format_linear_dry_run(resolve_config: Callable[..., ResolvedConfig], options: LinearOptions) -> str:
    """The resolved config and where each value comes from."""
    resolved = resume_linear_config(resolve_config(), options)
    resolved = resolve_linear_job(resolve_config, resolved, options, Console(options.quiet), World())[1]
    return dump_yaml(resolved.config, resolved.origin).rstrip()


def open_linear_data(
    config: LinearEvalConfig, job: LinearJob, options: LinearOptions, console: Console, world: World
) -> tuple[LabelledDataset, LabelledDataset, dict[str, LabelledDataset]]:
    """The images to train on, those to test on, and further test sets by name."""

    def open_datasets() -> tuple[LabelledDataset, LabelledDataset, dict[str, LabelledDataset]]:
        train, test = open_train_test(config, options.download, console)
        extra_tests = {
            name: match_classes(open_dataset(spec, split="val", download=options.download), train.classes)
            for name, spec in job.tests.items()
        }
        return train, test, extra_tests

    if options.download and world.size > 1:
        world.broadcast_from_main(lambda: len(open_datasets()))  # one process fetches
    return open_datasets()


def evaluate_test_set(images: LabelledDataset, features: ExtractedFeatures, linear: LinearClassifier) -> dict[str, Any]:
    """The same classifier on other images of its classes."""
    scores = ClassificationMetrics.from_logits(linear(features.features), features.labels)
    return {
        **scores.to_dict(),
        "data": images.source.spec,
        "images": len(features.labels),
        "missing_classes": list(images.missing_classes),
        "unknown_classes": list(images.unknown_classes),
        "per_class": scores.get_class_metrics(images.classes),
    }


def make_protocol_record(
    config: LinearEvalConfig,
    trainer: LinearTrainer,
    rate: float,
    train_features: ExtractedFeatures,
    test_features: ExtractedFeatures,
    extractor: FeatureExtractor,
) -> dict[str, Any]:
    fast = config.protocol == "fast"
    return {
        "form": config.protocol,
        "features": "centre crops, standardised" if fast else "random crops and flips, as they are",
        "optimiser": f"SGD, Nesterov momentum {config.optim.momentum:g}, cosine to 0, no weight decay",
        "rate_per_256": rate,
        "rate_chosen_on": f"{trainer.num_val_images} held-out training images"
        if trainer.num_val_images
        else "not chosen",
        "batch_size": trainer.batch_size,
        "epochs": config.optim.epochs,
        "max_steps": config.optim.max_steps,
        "train": config.data.train,
        "train_images": len(train_features.labels),
        "test": config.data.val or f"held-out share {config.eval.holdout:g} of {config.data.train}",
        "test_images": len(test_features.labels),
        "size": extractor.size,
        "crop_ratio": extractor.crop_ratio,
        "knn": f"cosine, weights exp(similarity / {TEMPERATURE}), all training images",
    }


def save_classifier(path: Path, linear: LinearClassifier, classes: tuple[str, ...]) -> None:
    tensors = {"weight": linear.weight.cpu().contiguous(), "bias": linear.bias.cpu().contiguous()}
    metadata = {"format": "relicctl-classifier", "version": __version__, "classes": json.dumps(classes)}
    checkpoint.write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def run_cluster_analysis(
    references: list[ResolvedEncoder],
    job: LinearJob,
    config: LinearEvalConfig,
    test: LabelledDataset,
    device: torch.device,
    run: RunFolder,
    console: Console,
    world: World,
) -> None:
    """analysis.json and analysis.png of all encoders, on the same test images."""
    rows = np.sort(permutation(len(test.source), config.seed, Stream.EVAL)[: config.analysis.images])
    subset = LabelledDataset(test.source.select(rows), test.labels[rows], test.classes)
    analyses, labels = {}, test.labels[rows]
    for source, reference in zip(job.sources, references, strict=True):
        features = FeatureExtractor(reference.encoder, config, device, run, console, world)(subset)
        labels = features.labels.cpu().numpy()
        if world.is_main:
            analyses[source] = analysis.analyze_clusters(
                features.features, features.labels, len(test.classes), config.seed
            )
    if not world.is_main:
        return
    records = {source: clusters.to_dict(test.classes, labels) for source, clusters in analyses.items()}
    run.write_json(run.path / "analysis.json", records)
    analysis.plot_clusters(run.path / "analysis.png", analyses, test.classes, labels)
    console.info("")
    console.print_table(
        [f"clusters of {len(labels)} images", "discriminant ratio", "distance to 5 nearest"],
        [[source, r["discriminant_ratio"], r["neighbour_distance"]] for source, r in records.items()],
    )
