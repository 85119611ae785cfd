"""``relicctl linear-eval``: how good frozen features are for a linear classifier and for nearest neighbours."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relicctl.commands import common
from relicctl.config import yaml_io
from relicctl.config.base import EncoderConfig, list_specs
from relicctl.config.linear_eval import LinearEvalConfig
from relicctl.config.resolve import ResolvedConfig, dump_yaml, load_run_config, replace_defaults
from relicctl.console import Console
from relicctl.core import atomic_io
from relicctl.core.counter_rng import Stream, permutation
from relicctl.core.distributed import World
from relicctl.core.hardware import pick_precision
from relicctl.core.tensor_file import save_tensors
from relicctl.data.datasets.open import check_data_exists, open_dataset
from relicctl.data.loader import resolve_cache
from relicctl.encoders.resolve import BASELINES, BaselineSpec, ResolvedEncoder, open_encoder
from relicctl.errors import DataError, UsageError
from relicctl.evaluation import cluster_analysis, reports
from relicctl.evaluation.features import FeatureExtractor, LabelledFeatures
from relicctl.evaluation.knn import TEMPERATURE, compute_knn_accuracy
from relicctl.evaluation.labelled_data import LabelledDataset, match_classes, open_train_test
from relicctl.evaluation.linear import LinearClassifier, LinearTrainer, SweepResult
from relicctl.evaluation.metrics import ClassificationMetrics
from relicctl.runs.distributed import RunContext, Session, open_distributed_session, open_or_create_run_folder
from relicctl.runs.folder import RunFolder, check_outside_data
from relicctl.runs.resume import LinearOptions, find_folder_to_resume, resume_config
from relicctl.version import __version__

TEST_FRACTION = 0.1  # of images that are given without others to test on
# images to train on, to test on, and further test sets by name
LinearData = tuple[LabelledDataset, LabelledDataset, dict[str, LabelledDataset]]


@dataclass(frozen=True)
class LinearJob:
    """What is evaluated; saved in config.yaml, so that ``--resume`` needs nothing else."""

    sources: tuple[str, ...]  # the first is evaluated; others are compared with it in the analysis
    network: str
    tests: dict[str, str]
    analysis: bool

    @classmethod
    def start(cls, sources: tuple[str, ...], options: LinearOptions) -> LinearJob:
        if not sources:
            raise UsageError("Missing encoder.", "Give a run, a file of weights, -, random or torchvision:NAME.")
        if len(sources) > 1 and not options.analysis:
            raise UsageError("Several encoders are compared only by --analysis.", "Add --analysis, or give one.")
        tests = common.parse_named_data(options.tests, "--test")
        return cls(tuple(dict.fromkeys(sources)), options.network, tests, options.analysis)

    @classmethod
    def resume(cls, saved: dict[str, Any], sources: tuple[str, ...], options: LinearOptions) -> LinearJob:
        """The saved job; further test sets and the analysis may be added."""
        before = tuple(saved["sources"])
        if sources not in ((), before):
            raise UsageError(f"The results are of {before[0]}, not of {sources[0]}.", "Name no encoder with --resume.")
        tests = saved["tests"] | common.parse_named_data(options.tests, "--test")
        return cls(before, saved["network"], tests, options.analysis or saved["analysis"])


def linear_eval(resolved: ResolvedConfig, options: LinearOptions) -> dict[str, Any]:
    """Run or resume a linear evaluation; returns ``run`` (the folder of results) and the content of results.json."""
    resolved = resolve_linear_config(resolved, options)
    with open_distributed_session(resolved.config.runtime, options.quiet) as session:
        return _run_linear_eval(resolved, options, session)


def format_linear_dry_run(resolved: ResolvedConfig, options: LinearOptions) -> str:
    """Return the resolved config and where each value comes from; it needs neither encoder nor data.

    Raises UsageError or DataError for an encoder or a path that is named and not there.
    """
    resolved, tests = resolve_linear_config(resolved, options), common.parse_named_data(options.tests, "--test")
    if options.sources or options.resume is not None:
        job, _ = common.resolve_job(LinearJob, options, World())
        references = open_linear_encoders(job, resolved.config, Console(options.quiet))
        resolved, tests = add_run_values(resolved, references[0].run, options), job.tests
    data = resolved.config.data
    for spec in (*list_specs(data.train), *list_specs(data.val), *tests.values()):
        check_data_exists(spec)
    return dump_yaml(resolved.config, resolved.origin).rstrip()


def _run_linear_eval(resolved: ResolvedConfig, options: LinearOptions, session: Session) -> dict[str, Any]:
    world = session.world
    job, out = common.resolve_job(LinearJob, options, world)
    references = open_linear_encoders(job, resolved.config, session.console)
    config: LinearEvalConfig = add_run_values(resolved, references[0].run, options).config
    out = common.choose_results_folder(out, *get_default_folder(references[0], job), world)
    if options.resume is None:
        check_outside_data(out, (*list_specs(config.data.train), *list_specs(config.data.val), *job.tests.values()))
    if config.protocol == "imagenet":
        world.get_local_rows(config.optim.batch_size)  # raises UsageError before anything is computed
    train, test, extra_tests = open_linear_data(config, job, options.download, session)

    run = open_or_create_run_folder(
        world, out, resumed=options.resume is not None, overwrite=options.overwrite, keep=config.checkpoint.keep
    )
    record = world.broadcast_from_main(lambda: save_linear_record(run, config, job, train, session))
    context = session.with_run(run, record["precision"])
    extractor = FeatureExtractor(references[0].encoder, config, context)
    seconds: dict[str, float] = {}
    with measure_seconds(seconds, "features"):
        train_features, test_features = extractor(train), extractor(test)
    trainer = LinearTrainer(config, train, train_features, extractor, record["cache"])
    linear, rate, sweep = train_classifier(trainer, config.sweep.lrs, context, seconds)
    extra_features = {name: extractor(images) for name, images in extra_tests.items()}
    results: dict[str, Any] = {}
    if world.is_main:
        scores = ClassificationMetrics.from_logits(linear(test_features.features), test_features.labels)
        train_pair, test_pair = ((f.features, f.labels) for f in (train_features, test_features))
        knn = compute_knn_accuracy(*train_pair, *test_pair)
        metadata: Any = references[0].encoder.metadata
        results = {
            **scores.to_dict(),
            **{f"knn{k}": accuracy for k, accuracy in knn.items()},
            "sweep": sweep.to_dict() if sweep else None,
            "per_class": scores.get_class_metrics(train.classes),
            "tests": {name: evaluate_test_set(extra_tests[name], f, linear) for name, f in extra_features.items()},
            "protocol": make_protocol_record(config, trainer, rate, len(test_features.labels)),
            "encoder": {"source": job.sources[0], "network": job.network, **dict(sorted(metadata.items()))},
            "confusion": scores.confusion.tolist(),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "version": __version__,
        }
        save_classifier(run.path / "classifier.safetensors", linear, train.classes)
        title = f"{job.sources[0]}: top-1 {scores.top1:.3f} on {len(test_features.labels)} images"
        run.write_json(run.results_path, results)
        reports.plot_linear_results(run.path / "linear.png", scores, list(results["per_class"]), sweep, title)
        reports.print_linear_results(results, session.console)
        if sweep and (warning := sweep.get_warning()):
            session.console.warn(warning)
    if job.analysis:
        encoders = {source: r.encoder for source, r in zip(job.sources, references, strict=True)}
        run_cluster_analysis(encoders, test, config, context)
    run.close()
    return {"run": str(run.path), **results}


def resolve_linear_config(resolved: ResolvedConfig, options: LinearOptions) -> ResolvedConfig:
    """Return the config, that of the folder to resume if there is one."""
    resumed = find_folder_to_resume(options)
    return resolved if resumed is None else resume_config(resolved, resumed)


def open_linear_encoders(job: LinearJob, config: LinearEvalConfig, console: Console) -> list[ResolvedEncoder]:
    if job.analysis:
        cluster_analysis.check_sklearn()
    baseline = BaselineSpec(config.model, config.seed, config.eval.size)
    return [open_encoder(source, job.network, baseline, console.warn) for source in job.sources]


def add_run_values(resolved: ResolvedConfig, run: Path | None, options: LinearOptions) -> ResolvedConfig:
    """Return the config with the encoder's run in place of defaults: its network, and its data unless others are given.

    A resumed evaluation has them in its own config. Of files without others to test on, a part is held out for that.
    """
    if options.resume is not None:
        return resolved
    values: dict[str, Any] = {}
    if run is not None:
        config = load_run_config(run / "config.yaml")
        values = {f"model.{name}": getattr(config.model, name) for name in EncoderConfig.model_fields}
        if resolved.origin["data.train"] == "default":
            keys = ("train", "val", "subset", "max_corrupt_fraction")
            values |= {f"data.{name}": getattr(config.data, name) for name in keys}
            values |= {f"data.decoding.{name}": value for name, value in config.data.decoding}
            values["seed"] = config.seed
            if config.eval.val_fraction:
                values["eval.val_fraction"] = config.eval.val_fraction
    resolved = replace_defaults(resolved, values)
    data = resolved.config.data
    has_files = any(spec.partition(":")[0] not in ("shapes", "torchvision") for spec in list_specs(data.train))
    if has_files and data.val is None:
        return replace_defaults(resolved, {"eval.val_fraction": TEST_FRACTION}, "no --val")
    return resolved


def get_default_folder(reference: ResolvedEncoder, job: LinearJob) -> tuple[Path, str]:
    """Return the parent and the name of the results' folder: beside the encoder, or under runs/ if it has no run."""
    kind = str(reference.path).partition(":")[0]
    variant = kind if kind in BASELINES else job.network
    return reference.run or Path("runs"), "linear-eval" + ("" if variant == "online" else f"-{variant}")


def open_linear_data(config: LinearEvalConfig, job: LinearJob, download: bool, session: Session) -> LinearData:
    def open_datasets() -> LinearData:
        warn = session.console.warn
        train, test = open_train_test(config, download, session.console)
        extra_tests = {
            name: match_classes(
                open_dataset(spec, split="val", download=download, decoding=config.data.decoding, warn=warn),
                train.classes,
            )
            for name, spec in job.tests.items()
        }
        return train, test, extra_tests

    if download and session.world.size > 1:
        session.world.broadcast_from_main(lambda: bool(open_datasets()))  # one rank downloads
    return open_datasets()


def save_linear_record(
    run: RunFolder, config: LinearEvalConfig, job: LinearJob, train: LabelledDataset, session: Session
) -> dict[str, Any]:
    """Write config.yaml and return what it says under ``run``: what must be the same when the evaluation resumes."""
    fingerprint = train.source.compute_fingerprint()
    saved: dict[str, Any] = {}
    if run.config_path.is_file():
        saved = yaml_io.load_mapping(run.config_path)["run"]
        if saved["data_fingerprint"] != fingerprint:
            raise DataError(
                f"The images are not those that {run.path} was started with.",
                "Give --data the same images, or start another evaluation.",
            )
    imagenet = config.protocol == "imagenet"
    record = {
        "version": __version__,
        "data_fingerprint": fingerprint,
        "cache": resolve_cache(config.data.cache, train.source, session.device) if imagenet else None,
        "precision": pick_precision(config.runtime.precision, session.device) if imagenet else "fp32",
        **saved,
        "job": asdict(job),
    }
    common.save_config(run, config, record)
    return record


def train_classifier(
    trainer: LinearTrainer, rates: tuple[float, ...], context: RunContext, seconds: dict[str, float]
) -> tuple[LinearClassifier, float, SweepResult | None]:
    """Choose the learning rate if there are several, and train on all images; return the classifier of raw features."""
    sweep, rate = None, rates[0]
    if len(rates) > 1:
        with measure_seconds(seconds, "sweep"):
            sweep = trainer.sweep_rates()
        rate = sweep.best_rate
    with measure_seconds(seconds, "fit"):
        classifiers, scaler = trainer.fit(context, np.arange(len(trainer.train_features.labels)), (rate,))
    linear = classifiers.get_classifier(0)
    return (linear if scaler is None else scaler.fold_into(linear)), rate, sweep


@contextmanager
def measure_seconds(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def evaluate_test_set(images: LabelledDataset, features: LabelledFeatures, linear: LinearClassifier) -> dict[str, Any]:
    """Evaluate the same classifier on other images of its classes."""
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
    config: LinearEvalConfig, trainer: LinearTrainer, rate: float, num_test_images: int
) -> dict[str, Any]:
    fast, num_val, num_train = config.protocol == "fast", trainer.num_val_images, len(trainer.train_features.labels)
    return {
        "form": config.protocol,
        "features": "centre crops, standardised" if fast else "random crops and flips, as they are",
        "optimiser": f"SGD, Nesterov momentum {config.optim.momentum:g}, cosine to 0, no weight decay",
        "rate_per_256": rate,
        "rate_chosen_on": f"{num_val} held-out training images" if num_val else "not chosen",
        "batch_size": trainer.choose_batch_size(num_train),
        "epochs": config.optim.epochs,
        "max_steps": config.optim.max_steps,
        "train": config.data.train,
        "train_images": num_train,
        "test": config.data.val
        or f"held-out share {config.eval.val_fraction:g} of {', '.join(list_specs(config.data.train))}",
        "test_images": num_test_images,
        "size": trainer.extractor.size,
        "crop_ratio": trainer.extractor.crop_ratio,
        "knn": f"cosine, weights exp(similarity / {TEMPERATURE}), all training images",
    }


def save_classifier(path: Path, linear: LinearClassifier, classes: tuple[str, ...]) -> None:
    tensors = {"weight": linear.weight.cpu().contiguous(), "bias": linear.bias.cpu().contiguous()}
    metadata = {"format": "relicctl-classifier", "version": __version__, "classes": json.dumps(classes)}
    atomic_io.write_atomically(path, lambda temporary: save_tensors(temporary, tensors, metadata))


def run_cluster_analysis(
    encoders: dict[str, Any], test: LabelledDataset, config: LinearEvalConfig, context: RunContext
) -> None:
    """Write analysis.json and analysis.png of all encoders, by source, on the same test images."""
    rows = np.sort(permutation(len(test.source), config.seed, Stream.EVAL)[: config.analysis.images])
    subset = LabelledDataset(test.source.select(rows), test.labels[rows], test.classes)
    analyses, labels = {}, subset.labels
    for source, encoder in encoders.items():
        features = FeatureExtractor(encoder, config, context)(subset)
        labels = features.labels.cpu().numpy()
        if context.world.is_main:
            analyses[source] = cluster_analysis.analyze_clusters(
                features.features, features.labels, len(test.classes), config.seed
            )
    if not context.world.is_main:
        return
    records = {source: clusters.to_dict(test.classes, labels) for source, clusters in analyses.items()}
    context.run.write_json(context.run.path / "analysis.json", records)
    cluster_analysis.plot_clusters(context.run.path / "analysis.png", analyses, test.classes, labels)
    context.console.info("")
    context.console.print_table(
        [f"clusters of {len(labels)} images", "discriminant ratio", "distance to 5 nearest"],
        [[source, r["discriminant_ratio"], r["neighbour_distance"]] for source, r in records.items()],
    )
