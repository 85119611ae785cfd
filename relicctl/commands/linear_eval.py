"""``relicctl linear-eval``: how good frozen features are for a linear classifier and for nearest neighbours."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from relicctl import __version__
from relicctl.baselines import KINDS, open_encoder
from relicctl.commands.common import pick_device, readable, worker_count
from relicctl.commands.options import LinearOptions
from relicctl.commands.resuming import continued
from relicctl.config import plain_yaml
from relicctl.config.linear import LinearConfig
from relicctl.config.resolve import Resolved, dump_yaml, load_run_config
from relicctl.config.schema import Network
from relicctl.console import Console
from relicctl.core import checkpoint
from relicctl.core.counted import Stream
from relicctl.core.distributed import World
from relicctl.core.loop import Batches, Plan, Progress, restore, train
from relicctl.data.augment import Photometric
from relicctl.data.feed import BadImages, Feed, ViewPlan, ViewSize, choose_cache
from relicctl.data.sampler import Sampler
from relicctl.data.sources import open_source
from relicctl.errors import DataError, UsageError
from relicctl.evaluation import analysis, report
from relicctl.evaluation.during import shuffled
from relicctl.evaluation.features import CHUNK, EvalImages, extract
from relicctl.evaluation.knn import TEMPERATURE, knn_accuracy
from relicctl.evaluation.labelled import Labelled, match, open_labelled
from relicctl.evaluation.linear import Classifiers, EncodedBatches, FeatureBatches, Linear, LinearTask, Standard
from relicctl.evaluation.report import Scores
from relicctl.evaluation.sweep import Choice, choose, hold_out
from relicctl.pretraining import pick_precision
from relicctl.reference import Reference, named
from relicctl.runs import RunFolder, free_name, refuse_occupied

FREE_TO_CHANGE = ("runtime.", "checkpoint.", "optim.max_steps", "analysis.", "data.")


@dataclass(frozen=True)
class Job:
    """What is evaluated; noted in config.yaml, so that ``--resume`` needs nothing else."""

    sources: tuple[str, ...]
    network: str
    tests: dict[str, str]
    analysis: bool


@dataclass(frozen=True)
class Seen:
    """What the encoder makes of labelled images: ``features`` ``[N, F]``, ``labels`` ``[N]``, ``rows`` in the data."""

    features: Tensor
    labels: Tensor
    rows: np.ndarray


def linear_eval(ask: Callable[..., Resolved], options: LinearOptions) -> dict[str, Any]:
    """Run or resume a linear evaluation; returns ``run`` (the folder of results) and the content of results.json.

    ``ask(base=...)`` resolves the config on top of what an encoder's run says.
    """
    console = Console(options.quiet)
    job, resolved, references, out = settle(ask, options, console)
    config = resolved.config
    device = pick_device(config.runtime.device)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)

    train_images, test_images = open_labelled(config, options.download, console)
    classes = train_images.classes
    tests = {
        name: match(open_source(spec, split="val", download=options.download), classes)
        for name, spec in job.tests.items()
    }
    run = open_folder(out, resumed=options.resume is not None, overwrite=options.overwrite, config=config)
    record = run_record(run, config, job, train_images, device)
    look = Look(references[0].encoder, config, device, run, console)
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

    scores = Scores.of(linear(asked.features), asked.labels)
    neighbours = knn_accuracy(known.features, known.labels, asked.features, asked.labels)
    metadata: Any = references[0].encoder.metadata
    results = {
        **scores.figures(),
        **{f"knn{k}": share for k, share in neighbours.items()},
        "sweep": choice.record() if choice else None,
        "per_class": scores.classes(classes),
        "tests": {name: score_further(look, images, linear) for name, images in tests.items()},
        "protocol": protocol(config, study, rate, known, asked, look),
        "encoder": {"source": job.sources[0], "network": job.network, **dict(sorted(metadata.items()))},
        "confusion": scores.confusion.tolist(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "version": __version__,
    }
    save_classifier(run.path / "classifier.safetensors", linear, classes)
    run.write_json(run.results, results)
    title = f"{job.sources[0]}: top-1 {scores.top1:.3f} on {len(asked.labels)} images"
    report.draw(run.path / "linear.png", scores, classes, choice, title)
    report.tell(results, console)
    if choice and (text := choice.warning()):
        console.warn(text)
    if job.analysis:
        analyse_all(references, job, config, test_images, device, run, console)
    run.close()
    return {"run": str(run.path), **results}


def dry_run(ask: Callable[..., Resolved], options: LinearOptions) -> str:
    """The resolved config and where each value comes from."""
    resolved = settle(ask, options, Console(options.quiet))[1]
    return dump_yaml(resolved.config, resolved.origin).rstrip()


# The steps of the recipe.


def settle(
    ask: Callable[..., Resolved], options: LinearOptions, console: Console
) -> tuple[Job, Resolved, list[Reference], Path]:
    """What is evaluated, how, and where the results go; refusals that need no data come here."""
    resolved = ask()  # wrong keys are refused before anything is opened
    out = options.out
    if options.resume is not None:
        out = Path(options.resume) if options.resume else out
        if out is None:
            raise UsageError("--resume names no folder of results.", "Write --resume DIR.")
        resolved = continued(resolved, out, FREE_TO_CHANGE)
        job = job_to_resume(options, out)
    else:
        job = new_job(options)
        if out is not None:
            refuse_occupied(out, overwrite=options.overwrite)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("linear-eval runs in one process.", "Start it without torchrun.")
    if job.analysis:
        analysis.require_sklearn()
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
        resolved = ask(base=values_of_run(references[0].run, resolved))
    return job, resolved, references, out or default_place(references[0], job)


def new_job(options: LinearOptions) -> Job:
    if not options.sources:
        raise UsageError("No encoder is named.", "Give a run, a file of weights, -, random or torchvision:NAME.")
    if len(options.sources) > 1 and not options.analysis:
        raise UsageError("Several encoders are compared only by --analysis.", "Add --analysis, or give one.")
    sources = tuple(dict.fromkeys(named(source) for source in options.sources))
    return Job(sources, options.network, further_tests(options.tests), options.analysis)


def job_to_resume(options: LinearOptions, out: Path) -> Job:
    """As noted at the start; further test sets and the analysis may be asked for later."""
    noted = plain_yaml.load_mapping(out / "config.yaml")["run"]["job"]
    sources = tuple(noted["sources"])
    if options.sources and options.sources != sources:
        raise UsageError(f"{out} evaluates {sources[0]}, not {options.sources[0]}.", "Name no encoder with --resume.")
    tests = noted["tests"] | further_tests(options.tests)
    return Job(sources, noted["network"], tests, options.analysis or noted["analysis"])


def further_tests(texts: tuple[str, ...]) -> dict[str, str]:
    """NAME=DATA, split at the first "="."""
    tests: dict[str, str] = {}
    for text in texts:
        name, equals, spec = text.partition("=")
        if not (name and equals and spec):
            raise UsageError(f"--test {text!r} is no NAME=DATA.", "Write it like --test sketch=imagenet-sketch.tar.")
        if name in tests:
            raise UsageError(f"--test {name} is given twice.", "Name every test set differently.")
        tests[name] = spec
    return tests


def values_of_run(run: Path, told: Resolved) -> dict[str, Any]:
    """What an encoder's run says about network and data; nothing of its data where others are given to train on."""
    config = load_run_config(run / "config.yaml")
    values: dict[str, Any] = {f"model.{name}": getattr(config.model, name) for name in Network.model_fields}
    if told.origin["data.train"] == "default":
        values |= {f"data.{name}": getattr(config.data, name) for name in ("train", "val", "subset", "max_bad")}
        values |= {"seed": config.seed, "eval.holdout": config.eval.holdout}
    return values


def default_place(reference: Reference, job: Job) -> Path:
    """A new folder beside the encoder, or under runs/ for one that belongs to no run."""
    kind = str(reference.path).partition(":")[0]
    variant = kind if kind in KINDS else job.network
    return free_name(reference.run or Path("runs"), "linear-eval" + ("" if variant == "online" else f"-{variant}"))


def open_folder(path: Path, *, resumed: bool, overwrite: bool, config: LinearConfig) -> RunFolder:
    if resumed and (path / "config.yaml").is_file():
        return RunFolder.reopen(path, keep=config.checkpoint.keep)
    return RunFolder.create(path, overwrite=overwrite, keep=config.checkpoint.keep)


def run_record(run: RunFolder, config: LinearConfig, job: Job, train: Labelled, device: torch.device) -> dict[str, Any]:
    """What config.yaml says under ``run``: facts that a continuation must share. Written at the start."""
    record: dict[str, Any] = {}
    if run.config.is_file():
        record = plain_yaml.load_mapping(run.config)["run"]
        if record["data_fingerprint"] != train.source.fingerprint():
            raise DataError(
                f"The images are not those that {run.path} was started with.",
                "Give --data the same images, or start another evaluation.",
            )
    imagenet = config.protocol == "imagenet"
    record = {
        "version": __version__,
        "data_fingerprint": train.source.fingerprint(),
        "cache": choose_cache(config.data.cache, train.source, device) if imagenet else None,
        "precision": pick_precision(config.runtime.precision, device) if imagenet else "fp32",
        **record,
        "job": asdict(job) | {"sources": list(job.sources)},
    }
    run.write_text(run.config, dump_yaml(config) + yaml.safe_dump({"run": record}, sort_keys=False))
    return record


class Look:
    """The encoder, frozen, and how it is shown images. Those that cannot be decoded are left out and noted."""

    def __init__(
        self, encoder: Any, config: LinearConfig, device: torch.device, run: RunFolder, console: Console
    ) -> None:
        self.encoder: nn.Module = encoder.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.size = config.eval.size or int(encoder.metadata["size"])
        self.crop_ratio = config.eval.crop_ratio or float(encoder.metadata["crop_ratio"])
        self.device, self._console, self._max_bad = device, console, config.data.max_bad
        self._run, self._listed = run, run.read_bad_images()

    def bad_images(self, images: Labelled) -> BadImages:
        return BadImages(len(images.source), self._max_bad, self._list)

    def _list(self, name: str, reason: str) -> None:
        if name not in self._listed:
            self._listed.add(name)
            self._run.add_bad_image(name, reason)

    def __call__(self, images: Labelled) -> Seen:
        crops = EvalImages(images.source, self.size, self.crop_ratio)
        steps = -(-len(crops) // CHUNK)
        self._console.note(f"features of {len(crops)} images of {images.source.spec}, {CHUNK} a step")
        with self._console.progress(steps) as bar:

            def counted() -> Iterator[np.ndarray]:
                for step, chunk in enumerate(crops):
                    yield chunk
                    bar.update(step + 1, {})

            features = extract(self.encoder, counted(), self.device)
        bad = self.bad_images(images)
        for index, reason in sorted(crops.bad.items()):
            bad.add(images.source.key(index), reason)
        rows = np.array([i for i in range(len(crops)) if i not in crops.bad], dtype=np.int64)
        picked = torch.from_numpy(rows).to(self.device)
        return Seen(features[picked], torch.from_numpy(images.labels[rows]).to(self.device), rows)


class Study:
    """Trains classifiers on rows of the training images, by either protocol, through the training loop."""

    def __init__(
        self,
        config: LinearConfig,
        images: Labelled,
        known: Seen,
        look: Look,
        record: dict[str, Any],
        run: RunFolder,
        console: Console,
    ) -> None:
        self._config, self._images, self._known = config, images, known
        self._look, self._record, self._run, self._console = look, record, run, console
        self.batch_size, self.held_out = config.optim.batch_size, 0
        if config.protocol == "fast":
            self.batch_size = min(self.batch_size, len(known.labels))

    def sweep(self) -> Choice:
        """All rates on the training images but a held-out part, compared on that part; a run within the run."""
        folder = open_folder(self._run.path / "sweep", resumed=True, overwrite=False, config=self._config)
        folder.write_text(folder.config, self._run.config.read_text("utf-8"))
        kept, held = hold_out(len(self._known.labels), self._config.sweep.holdout, self._config.seed)
        self._console.note(f"{len(self._config.sweep.rates)} learning rates, compared on {len(held)} images")
        classifiers, standard = self.fit(folder, kept, self._config.sweep.rates)
        features, labels = (t[torch.from_numpy(held).to(t.device)] for t in (self._known.features, self._known.labels))
        self.held_out = len(held)
        folder.close()
        return choose(classifiers, standard(features) if standard else features, labels)

    def fit(self, folder: RunFolder, rows: np.ndarray, rates: tuple[float, ...]) -> tuple[Classifiers, Standard | None]:
        """The classifiers, and what standardises the features that they take."""
        config, device = self._config, self._look.device
        batch_size = min(self.batch_size, len(rows)) if config.protocol == "fast" else self.batch_size
        sampler = Sampler(config.seed, len(rows), batch_size)
        batches, standard = self._batches(rows, sampler)
        scheduled = sampler.steps_per_epoch * config.optim.epochs
        task = LinearTask(
            self._known.features.shape[1],
            len(self._images.classes),
            rates,
            batch_size=batch_size,
            momentum=config.optim.momentum,
            total_steps=scheduled,
            device=device,
        )
        plan = Plan(
            total=min(scheduled, config.optim.max_steps or scheduled),
            steps_per_epoch=sampler.steps_per_epoch,
            batch_size=batch_size,
            log_every=config.runtime.log_every,
            checkpoint_every=config.checkpoint.every_steps,
            checkpoint_minutes=config.checkpoint.every_minutes,
            resume_command=f"relicctl linear-eval --resume {self._run.path}",
        )
        progress = go_on(folder, task, rates, self._console)
        with self._console.progress(plan.total, progress.step) as bar:
            train(
                task,
                batches,
                plan,
                folder,
                progress=progress,
                device=device,
                show=lambda step, figures: bar.update(step, readable(figures)),
            )
        return task.state, standard

    def _batches(self, rows: np.ndarray, sampler: Sampler) -> tuple[Batches, Standard | None]:
        config, look, known = self._config, self._look, self._known
        if config.protocol == "fast":
            picked = torch.from_numpy(rows).to(look.device)
            features = known.features[picked]
            standard = Standard.of(features)
            return FeatureBatches(standard(features), known.labels[picked], sampler), standard
        size = ViewSize(1, look.size, config.crop.area)
        flip = Photometric(flip=config.crop.flip, jitter=0, grayscale=0, blur=(0, 0), solarize=(0, 0))
        feed = Feed(
            self._images.source.select(known.rows[rows]),
            sampler,
            ViewPlan((size,), config.crop.aspect, flip),
            seed=config.seed,
            device=look.device,
            world=World(),
            cache=self._record["cache"],
            workers=worker_count(config.runtime, look.device, self._record["cache"]),
            bad=look.bad_images(self._images),
        )
        autocast = torch.autocast(look.device.type, torch.bfloat16, enabled=self._record["precision"] == "bf16")
        return EncodedBatches(feed, look.encoder, autocast), None


def go_on(folder: RunFolder, task: LinearTask, rates: tuple[float, ...], console: Console) -> Progress:
    """From the newest checkpoint of these rates that can be read; else from the start."""
    found = checkpoint.newest_valid(folder.checkpoints, console.warn)
    if found is not None and found[1]["state.rates"].tolist() == list(rates):
        progress = restore(task, found[1], found[2], str(found[0]))
    else:
        progress = Progress()
        for stale in checkpoint.listed(folder.checkpoints):
            stale.unlink()
    folder.rewind_metrics(progress.step if progress.step else -1)
    if progress.step:
        console.note(f"resumed from {found[0] if found else folder.path} at step {progress.step}")
    return progress


def score_further(look: Look, images: Labelled, linear: Linear) -> dict[str, Any]:
    """The same classifier on other images of its classes."""
    seen = look(images)
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
) -> None:
    """analysis.json and analysis.png of all encoders, on the same test images."""
    rows = np.sort(shuffled(len(test.source), config.seed, Stream.EVAL)[: config.analysis.images])
    some = Labelled(test.source.select(rows), test.labels[rows], test.classes)
    found, labels = {}, test.labels[rows]
    for source, reference in zip(job.sources, references, strict=True):
        seen = Look(reference.encoder, config, device, run, console)(some)
        labels = seen.labels.cpu().numpy()
        found[source] = analysis.analyse(seen.features, seen.labels, len(test.classes), config.seed)
    records = {source: clusters.record(test.classes, labels) for source, clusters in found.items()}
    run.write_json(run.path / "analysis.json", records)
    analysis.draw(run.path / "analysis.png", found, test.classes, labels)
    console.note("")
    console.table(
        [f"clusters of {len(labels)} images", "discriminant ratio", "distance to 5 nearest"],
        [[source, r["discriminant_ratio"], r["neighbour_distance"]] for source, r in records.items()],
    )
