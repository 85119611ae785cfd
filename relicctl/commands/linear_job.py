"""What a linear evaluation is asked to do: from the command line, the encoder's run, or the folder to go on with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from relicctl import __version__
from relicctl.baselines import BASELINES, open_encoder
from relicctl.commands import resuming
from relicctl.commands.options import LinearOptions
from relicctl.commands.processes import open_on_main
from relicctl.config import plain_yaml
from relicctl.config.linear import LinearEvalConfig
from relicctl.config.resolve import ResolvedConfig, dump_yaml, load_run_config
from relicctl.config.schema import EncoderConfig
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.core.hardware import pick_precision
from relicctl.data.feed import resolve_cache
from relicctl.errors import DataError, UsageError
from relicctl.evaluation import analysis
from relicctl.evaluation.labelled import LabelledDataset
from relicctl.reference import ResolvedEncoder, read_path_from_stdin
from relicctl.runs import RunFolder, check_overwrite, find_free_name

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
    return resuming.resume_config(resolved, out, LINEAR_MUTABLE_KEYS)


def get_linear_folder(options: LinearOptions) -> Path | None:
    return Path(options.resume) if options.resume else options.out


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
        analysis.check_sklearn()
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
    record = plain_yaml.load_mapping(out / "config.yaml")["run"]["job"]
    sources = tuple(record["sources"])
    if options.sources and options.sources != sources:
        raise UsageError(f"{out} evaluates {sources[0]}, not {options.sources[0]}.", "Name no encoder with --resume.")
    tests = record["tests"] | parse_test_sets(options.tests)
    return LinearJob(sources, record["network"], tests, options.analysis or record["analysis"])


def parse_test_sets(texts: tuple[str, ...]) -> dict[str, str]:
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


def get_run_values(run: Path, resolved: ResolvedConfig) -> dict[str, Any]:
    """What an encoder's run says about network and data; nothing of its data where others are given to train on."""
    config = load_run_config(run / "config.yaml")
    values: dict[str, Any] = {f"model.{name}": getattr(config.model, name) for name in EncoderConfig.model_fields}
    if resolved.origin["data.train"] == "default":
        values |= {f"data.{name}": getattr(config.data, name) for name in ("train", "val", "subset", "max_bad")}
        values |= {"seed": config.seed, "eval.holdout": config.eval.holdout}
    return values


def make_default_folder(reference: ResolvedEncoder, job: LinearJob) -> Path:
    """A new folder beside the encoder, or under runs/ for one that belongs to no run."""
    kind = str(reference.path).partition(":")[0]
    variant = kind if kind in BASELINES else job.network
    return find_free_name(reference.run or Path("runs"), "linear-eval" + ("" if variant == "online" else f"-{variant}"))


def open_linear_folder(
    path: Path, world: World, *, resumed: bool, overwrite: bool, config: LinearEvalConfig
) -> RunFolder:
    keep = config.checkpoint.keep
    if resumed and (path / "config.yaml").is_file():
        return open_on_main(world, lambda: RunFolder.reopen(path, keep=keep), path, keep)
    return open_on_main(world, lambda: RunFolder.create(path, overwrite=overwrite, keep=keep), path, keep)


def save_linear_record(
    run: RunFolder, config: LinearEvalConfig, job: LinearJob, train: LabelledDataset, device: torch.device
) -> dict[str, Any]:
    """What config.yaml says under ``run``: facts that a continuation must share. Written at the start."""
    record: dict[str, Any] = {}
    if run.config_path.is_file():
        record = plain_yaml.load_mapping(run.config_path)["run"]
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
