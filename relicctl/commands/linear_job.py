"""What a linear evaluation is asked to do: from the command line, the encoder's run, or the folder to go on with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from relicctl import __version__
from relicctl.baselines import KINDS, open_encoder
from relicctl.commands import resuming
from relicctl.commands.options import LinearOptions
from relicctl.commands.processes import owned
from relicctl.config import plain_yaml
from relicctl.config.linear import LinearConfig
from relicctl.config.resolve import Resolved, dump_yaml, load_run_config
from relicctl.config.schema import Network
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.core.hardware import pick_precision
from relicctl.data.feed import choose_cache
from relicctl.errors import DataError, UsageError
from relicctl.evaluation import analysis
from relicctl.evaluation.labelled import Labelled
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


def continued(resolved: Resolved, options: LinearOptions) -> Resolved:
    """The config, that of the folder to go on with where there is one."""
    if options.resume is None:
        return resolved
    out = folder(options)
    if out is None:
        raise UsageError("--resume names no folder of results.", "Write --resume DIR.")
    return resuming.continued(resolved, out, FREE_TO_CHANGE)


def folder(options: LinearOptions) -> Path | None:
    return Path(options.resume) if options.resume else options.out


def settle(
    ask: Callable[..., Resolved], resolved: Resolved, options: LinearOptions, console: Console, world: World
) -> tuple[Job, Resolved, list[Reference], Path]:
    """What is evaluated, how, and where the results go; refusals that need no data come here."""
    out = folder(options)
    if options.resume is not None:
        assert out is not None
        job = job_to_resume(options, out)
    else:
        job = new_job(options, world)
        if out is not None:
            refuse_occupied(out, overwrite=options.overwrite)
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
    place = world.lead(lambda: str(out or default_place(references[0], job)))
    return job, resolved, references, Path(place)


def new_job(options: LinearOptions, world: World) -> Job:
    if not options.sources:
        raise UsageError("No encoder is named.", "Give a run, a file of weights, -, random or torchvision:NAME.")
    if len(options.sources) > 1 and not options.analysis:
        raise UsageError("Several encoders are compared only by --analysis.", "Add --analysis, or give one.")
    sources = world.lead(lambda: [named(source) for source in options.sources])  # one process reads stdin
    return Job(tuple(dict.fromkeys(sources)), options.network, further_tests(options.tests), options.analysis)


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


def open_folder(path: Path, world: World, *, resumed: bool, overwrite: bool, config: LinearConfig) -> RunFolder:
    keep = config.checkpoint.keep
    if resumed and (path / "config.yaml").is_file():
        return owned(world, lambda: RunFolder.reopen(path, keep=keep), path, keep)
    return owned(world, lambda: RunFolder.create(path, overwrite=overwrite, keep=keep), path, keep)


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
