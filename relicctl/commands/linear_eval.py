"""``relicctl linear-eval``: how good frozen features are for a linear classifier and for nearest neighbours."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from relicctl.commands.common import get_linear_folder, parse_test_sets
from relicctl.config import yaml_io
from relicctl.config.base import EncoderConfig
from relicctl.config.linear_eval import LinearEvalConfig
from relicctl.config.resolve import ResolvedConfig, dump_yaml, load_run_config
from relicctl.console import Console
from relicctl.core import atomic_io
from relicctl.core.counter_rng import Stream, permutation
from relicctl.core.distributed import World
from relicctl.core.hardware import pick_precision
from relicctl.data.datasets.open import open_dataset
from relicctl.data.loader import resolve_cache
from relicctl.encoders.resolve import BASELINES, ResolvedEncoder, open_encoder, read_path_from_stdin
from relicctl.errors import DataError, UsageError
from relicctl.evaluation import cluster_analysis, reports
from relicctl.evaluation.features import ExtractedFeatures, FeatureExtractor
from relicctl.evaluation.knn import TEMPERATURE, compute_knn_accuracy
from relicctl.evaluation.labelled_data import LabelledDataset, match_classes, open_train_test
from relicctl.evaluation.linear import LinearClassifier, LinearTrainer
from relicctl.evaluation.metrics import ClassificationMetrics
from relicctl.runs import resume
from relicctl.runs.distributed import open_distributed_session, open_or_create_run_folder
from relicctl.runs.folder import RunFolder, check_overwrite, find_free_name
from relicctl.runs.resume import LinearOptions
from relicctl.version import __version__


def linear_eval(resolve_config: Callable[..., ResolvedConfig], options: LinearOptions) -> dict[str, Any]:
    """Run or resume a linear evaluation; returns ``run`` (the folder of results) and the content of results.json.

    ``ask(base=...)`` resolves the config on top of what an encoder's run says.
    """
    resolved = resume_linear_config(resolve_config(), options)  # wrong keys are refused before anything is opened
    with open_distributed_session(resolved.config.runtime, options.quiet) as session:
        return _run_linear_eval(resolve_config, resolved, options, session.device, session.console, session.world)


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
    run = open_or_create_run_folder(
        world, out, resumed=options.resume is not None, overwrite=options.overwrite, keep=config.checkpoint.keep
    )
    record = world.broadcast_from_main(lambda: save_linear_record(run, config, job, train_images, device))
    extractor = FeatureExtractor(references[0].encoder, config, device, run, console, world)
    started = time.perf_counter()
    train_features, test_features = extractor(train_images), extractor(test_images)
    seconds = {"features": time.perf_counter() - started}

    trainer = LinearTrainer(config, train_images, train_features, extractor, record, run, console)
    choice, rate = None, config.sweep.lrs[0]
    if len(config.sweep.lrs) > 1:
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
        reports.plot_linear_results(run.path / "linear.png", scores, train_images.classes, choice, title)
        reports.print_linear_results(results, console)
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
        "test": config.data.val or f"held-out share {config.eval.val_fraction:g} of {config.data.train}",
        "test_images": len(test_features.labels),
        "size": extractor.size,
        "crop_ratio": extractor.crop_ratio,
        "knn": f"cosine, weights exp(similarity / {TEMPERATURE}), all training images",
    }


def save_classifier(path: Path, linear: LinearClassifier, classes: tuple[str, ...]) -> None:
    tensors = {"weight": linear.weight.cpu().contiguous(), "bias": linear.bias.cpu().contiguous()}
    metadata = {"format": "relicctl-classifier", "version": __version__, "classes": json.dumps(classes)}
    atomic_io.write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


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
            analyses[source] = cluster_analysis.analyze_clusters(
                features.features, features.labels, len(test.classes), config.seed
            )
    if not world.is_main:
        return
    records = {source: clusters.to_dict(test.classes, labels) for source, clusters in analyses.items()}
    run.write_json(run.path / "analysis.json", records)
    cluster_analysis.plot_clusters(run.path / "analysis.png", analyses, test.classes, labels)
    console.info("")
    console.print_table(
        [f"clusters of {len(labels)} images", "discriminant ratio", "distance to 5 nearest"],
        [[source, r["discriminant_ratio"], r["neighbour_distance"]] for source, r in records.items()],
    )


LINEAR_MUTABLE_KEYS = ("runtime.", "checkpoint.", "optim.max_steps", "analysis.", "data.")


@dataclass(frozen=True)
class LinearJob:
    """What is evaluated; noted in config.yaml, so that ``--resume`` needs nothing else."""

    sources: tuple[str, ...]
    network: str
    tests: dict[str, str]
    analysis: bool


def resume_linear_config(resolved: ResolvedConfig, options: LinearOptions) -> ResolvedConfig:
    """The config, that of the folder to go on with where there is one."""
    if options.resume is None:
        return resolved
    out = get_linear_folder(options)
    if out is None:
        raise UsageError("--resume names no folder of results.", "Write --resume DIR.")
    return resume.resume_config(resolved, out, LINEAR_MUTABLE_KEYS)


def resolve_linear_job(
    resolve_config: Callable[..., ResolvedConfig],
    resolved: ResolvedConfig,
    options: LinearOptions,
    console: Console,
    world: World,
) -> tuple[LinearJob, ResolvedConfig, list[ResolvedEncoder], Path]:
    """What is evaluated, how, and where the results go; refusals that need no data come here."""
    out = get_linear_folder(options)
    if options.resume is not None:
        assert out is not None
        job = load_linear_job(options, out)
    else:
        job = make_linear_job(options, world)
        if out is not None:
            check_overwrite(out, overwrite=options.overwrite)
    if job.analysis:
        cluster_analysis.check_sklearn()
    config = resolved.config
    references = [
        open_encoder(
            source,
            network=job.network,
            model=config.model,
            size=config.eval.size,
            seed=config.seed,
            warn=console.warn,
        )
        for source in job.sources
    ]
    if options.resume is None and references[0].run is not None:
        resolved = resolve_config(base=get_run_values(references[0].run, resolved))
    out_path = world.broadcast_from_main(lambda: str(out or make_default_folder(references[0], job)))
    return job, resolved, references, Path(out_path)


def make_linear_job(options: LinearOptions, world: World) -> LinearJob:
    if not options.sources:
        raise UsageError("No encoder is named.", "Give a run, a file of weights, -, random or torchvision:NAME.")
    if len(options.sources) > 1 and not options.analysis:
        raise UsageError("Several encoders are compared only by --analysis.", "Add --analysis, or give one.")
    sources = world.broadcast_from_main(
        lambda: [read_path_from_stdin(source) for source in options.sources]
    )  # one process reads stdin
    return LinearJob(tuple(dict.fromkeys(sources)), options.network, parse_test_sets(options.tests), options.analysis)


def load_linear_job(options: LinearOptions, out: Path) -> LinearJob:
    """As noted at the start; further test sets and the analysis may be asked for later."""
    record = yaml_io.load_mapping(out / "config.yaml")["run"]["job"]
    sources = tuple(record["sources"])
    if options.sources and options.sources != sources:
        raise UsageError(f"{out} evaluates {sources[0]}, not {options.sources[0]}.", "Name no encoder with --resume.")
    tests = record["tests"] | parse_test_sets(options.tests)
    return LinearJob(sources, record["network"], tests, options.analysis or record["analysis"])


def get_run_values(run: Path, resolved: ResolvedConfig) -> dict[str, Any]:
    """What an encoder's run says about network and data; nothing of its data where others are given to train on."""
    config = load_run_config(run / "config.yaml")
    values: dict[str, Any] = {f"model.{name}": getattr(config.model, name) for name in EncoderConfig.model_fields}
    if resolved.origin["data.train"] == "default":
        values |= {
            f"data.{name}": getattr(config.data, name) for name in ("train", "val", "subset", "max_corrupt_fraction")
        }
        values |= {"seed": config.seed, "eval.val_fraction": config.eval.val_fraction}
    return values


def make_default_folder(reference: ResolvedEncoder, job: LinearJob) -> Path:
    """A new folder beside the encoder, or under runs/ for one that belongs to no run."""
    kind = str(reference.path).partition(":")[0]
    variant = kind if kind in BASELINES else job.network
    return find_free_name(reference.run or Path("runs"), "linear-eval" + ("" if variant == "online" else f"-{variant}"))


def save_linear_record(
    run: RunFolder, config: LinearEvalConfig, job: LinearJob, train: LabelledDataset, device: torch.device
) -> dict[str, Any]:
    """What config.yaml says under ``run``: facts that a continuation must share. Written at the start."""
    record: dict[str, Any] = {}
    if run.config_path.is_file():
        record = yaml_io.load_mapping(run.config_path)["run"]
        if record["data_fingerprint"] != train.source.compute_fingerprint():
            raise DataError(
                f"The images are not those that {run.path} was started with.",
                "Give --data the same images, or start another evaluation.",
            )
    imagenet = config.protocol == "imagenet"
    record = {
        "version": __version__,
        "data_fingerprint": train.source.compute_fingerprint(),
        "cache": resolve_cache(config.data.cache, train.source, device) if imagenet else None,
        "precision": pick_precision(config.runtime.precision, device) if imagenet else "fp32",
        **record,
        "job": asdict(job) | {"sources": list(job.sources)},
    }
    run.write_text(run.config_path, dump_yaml(config) + yaml.safe_dump({"run": record}, sort_keys=False))
    return record
