"""``relicctl transfer``: compare encoders by classification, segmentation or detection on other data sets."""

from __future__ import annotations

import shlex
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relicctl.commands.common import choose_results_folder, resolve_job, save_config
from relicctl.config.resolve import ResolvedConfig, dump_yaml, resolve_from_run
from relicctl.config.transfer import TransferConfig
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.core.hardware import pick_precision
from relicctl.data.datasets.open import check_data_exists
from relicctl.encoders.resolve import BaselineSpec, ResolvedEncoder, open_encoders
from relicctl.errors import UsageError, raise_interrupted
from relicctl.evaluation import reports
from relicctl.evaluation.cells import Cell, TransferTask, check_unique_encoders
from relicctl.evaluation.dense.transfer import DENSE_TASKS, DenseTransfer
from relicctl.evaluation.labelled_data import check_label_subset
from relicctl.evaluation.transfer import ClassificationTransfer, format_labels
from relicctl.runs.distributed import Session, open_distributed_session, open_or_create_run_folder
from relicctl.runs.folder import RunFolder, check_outside_data
from relicctl.runs.resume import TransferOptions, find_folder_to_resume
from relicctl.version import __version__


@dataclass(frozen=True)
class TransferJob:
    """Which encoders are compared; saved in config.yaml, so that ``--resume`` needs nothing else."""

    sources: tuple[str, ...]
    baselines: tuple[str, ...]
    network: str

    @property
    def encoders(self) -> tuple[str, ...]:
        return self.sources + self.baselines

    @classmethod
    def start(cls, sources: tuple[str, ...], options: TransferOptions) -> TransferJob:
        return cls(sources, options.baselines, options.network)

    @classmethod
    def resume(cls, saved: dict[str, Any], sources: tuple[str, ...], options: TransferOptions) -> TransferJob:
        if options.network not in ("online", saved["network"]):
            raise UsageError(
                f"The results are of the {saved['network']} networks, not of the {options.network} ones.",
                "Choose another --out.",
            )
        return cls(sources or tuple(saved["sources"]), options.baselines or tuple(saved["baselines"]), saved["network"])


def transfer(resolved: ResolvedConfig, options: TransferOptions) -> dict[str, Any]:
    """Run or resume a comparison; returns ``run`` (the folder of results) and the content of results.json."""
    resolved = resolve_transfer_config(resolved, options)
    task = build_task(resolved.config)
    with open_distributed_session(resolved.config.runtime, options.quiet) as session:
        warn_unknown_datasets(resolved, session.console)
        return _run_transfer(task, options, session)


def format_transfer_dry_run(resolved: ResolvedConfig, options: TransferOptions) -> str:
    """Return the resolved config and where each value comes from; it needs neither encoders nor data.

    Raises UsageError or DataError for an encoder or a path that is named and not there.
    """
    resolved = resolve_transfer_config(resolved, options)
    config = resolved.config
    check_labels(config)
    if options.sources or options.baselines or options.resume is not None:
        job, _ = resolve_job(TransferJob, options, World())
        check_named_once(job)
        open_job_encoders(job, config, Console(options.quiet))
    for spec in config.data.datasets.values():
        check_data_exists(spec)
    return dump_yaml(resolved.config, resolved.origin).rstrip()


def _run_transfer(task: TransferTask, options: TransferOptions, session: Session) -> dict[str, Any]:
    config, world = task.config, session.world
    job, out = resolve_transfer_job(config, options, world)
    references = open_job_encoders(job, config, session.console)
    encoders = [task.load_encoder(name, r.encoder) for name, r in zip(job.encoders, references, strict=True)]
    task.open_data(session, options.download)
    run = open_or_create_run_folder(
        world, out, resumed=options.resume is not None, overwrite=options.overwrite, keep=config.checkpoint.keep
    )
    resume_command = f"relicctl transfer {task.resume_option}--resume {shlex.quote(str(run.path))}"
    what_is_saved = "before the end; finished cells are saved."
    with closing(run), raise_interrupted(what_is_saved, f"Resume with: {resume_command}"):
        save_config(run, config, {"version": __version__, "job": asdict(job)})
        check_unique_encoders(encoders)
        context = session.with_run(run, pick_precision(config.runtime.precision, session.device))
        cells = task.compute_cells(encoders, context)
        results = {
            "cells": cells,
            "relative": reports.list_relative_improvements(cells, job.encoders, job.baselines),
            "encoders": {encoder.name: encoder.record for encoder in encoders},
            "baselines": list(job.baselines),
            "data": task.describe_data(),
            "version": __version__,
        }
        run.write_json(run.results_path, results)
        if world.is_main:
            report_transfer(task, cells, job, run, session.console)
    return {"run": str(run.path), **results}


def build_task(config: Any) -> TransferTask:
    return DenseTransfer(config) if type(config) in DENSE_TASKS else ClassificationTransfer(config)


def resolve_transfer_config(resolved: ResolvedConfig, options: TransferOptions) -> ResolvedConfig:
    """Return the config, on top of that of the folder to resume."""
    resumed = find_folder_to_resume(options)
    return resolved if resumed is None else resolve_from_run(resolved, resumed / "config.yaml")


def resolve_transfer_job(config: Any, options: TransferOptions, world: World) -> tuple[TransferJob, Path]:
    """Return which encoders are compared and where results go. Raises UsageError for whatever needs no data to see."""
    job, out = resolve_job(TransferJob, options, world)
    if not job.sources:
        raise UsageError("Missing encoder.", "Give runs, files of weights, -, random or torchvision:NAME.")
    check_named_once(job)
    if not config.data.datasets:
        raise UsageError("Missing --data.", "Give --data NAME=DATA, or --preset byol-suite.")
    check_labels(config)
    folder = choose_results_folder(out, Path("runs"), "transfer", world)
    if options.resume is None:
        check_outside_data(folder, config.data.datasets.values())
    return job, folder


def check_named_once(job: TransferJob) -> None:
    duplicates = [name for number, name in enumerate(job.encoders) if name in job.encoders[:number]]
    if duplicates:
        raise UsageError(f"The encoder {duplicates[0]} is named twice.", "Name every encoder once, baselines included.")


def check_labels(config: Any) -> None:
    for labels in getattr(config, "labels", ()):  # dense tasks use all labels
        check_label_subset(format_labels(labels))


def open_job_encoders(job: TransferJob, config: Any, console: Console) -> list[ResolvedEncoder]:
    size = config.eval.size if isinstance(config, TransferConfig) else None
    return open_encoders(job.encoders, job.network, BaselineSpec(config.model, config.seed, size), console.warn)


def warn_unknown_datasets(resolved: ResolvedConfig, console: Console) -> None:
    """Warn of settings on the command line for data sets that are none of the data: a typo would go unnoticed."""
    data = resolved.config.data
    for key, values in data:
        if isinstance(values, dict) and resolved.origin[f"data.{key}"] == "--set":
            for unknown in sorted(values.keys() - data.datasets.keys()):
                console.warn(f"data.{key}: unknown data set {unknown} (there are {', '.join(data.datasets)})")


def report_transfer(task: TransferTask, cells: list[Cell], job: TransferJob, run: RunFolder, console: Console) -> None:
    """Print the table on stderr, and write it with notes to table.md, and the chart."""
    header, rows = reports.build_transfer_table(cells, job.encoders, job.baselines)
    console.info("")
    console.print_table(header, rows)
    names = reports.shorten_encoder_names(job.encoders)
    abbreviations = [f"{names[name]} = {name}" for name in job.encoders if names[name] != name]
    notes = task.format_notes(cells, abbreviations)
    run.write_text(run.path / "table.md", reports.format_markdown(header, rows, notes))
    reports.plot_transfer_chart(run.path / "chart.png", cells, job.encoders, job.baselines)
