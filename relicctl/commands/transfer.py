"""``relicctl transfer``: do an encoder's features serve other data sets, and better than another encoder's?"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from relicctl.commands.common import get_transfer_folder
from relicctl.config import yaml_io
from relicctl.config.resolve import ResolvedConfig, dump_yaml, resolve_from_run
from relicctl.config.transfer import DetectionConfig, TransferConfig
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.encoders.resolve import TransferJob, open_encoders, read_path_from_stdin
from relicctl.errors import Interrupted, Terminated, UsageError
from relicctl.evaluation import reports
from relicctl.evaluation.dense.detection import check_pycocotools
from relicctl.evaluation.dense.transfer import DENSE_TASKS, DenseTrainer, load_dense_encoders, make_dense_data_record
from relicctl.evaluation.labelled_data import check_label_subset
from relicctl.evaluation.transfer import (
    check_finetune_batch,
    check_unique_encoders,
    evaluate_cell,
    format_sampling_notes,
    make_data_record,
    make_loaded_encoder,
    open_transfer_datasets,
    resolve_metric,
    warn_unknown_datasets,
)
from relicctl.evaluation.transfer_data import split_trainval
from relicctl.runs.distributed import open_distributed_session, open_or_create_run_folder
from relicctl.runs.folder import RunFolder, check_overwrite, find_free_name
from relicctl.runs.resume import TransferOptions
from relicctl.version import __version__


def transfer(resolved: ResolvedConfig, options: TransferOptions) -> dict[str, Any]:
    """Run or resume a comparison; returns ``run`` (the folder of results) and the content of results.json."""
    resolved = resume_transfer_config(resolved, options)
    with open_distributed_session(resolved.config.runtime, options.quiet) as session:
        warn_unknown_datasets(resolved, session.console)
        return _run_transfer(resolved.config, options, session.device, session.console, session.world)


def _run_transfer(
    config: TransferConfig, options: TransferOptions, device: torch.device, console: Console, world: World
) -> dict[str, Any]:
    job, out = resolve_transfer_job(config, options, world)
    references = open_encoders(job, config, console)
    sets = open_transfer_datasets(config, options, console, world)
    for data in sets:
        resolve_metric(data, config)
    for labels in map(format_labels, config.labels):  # before anything is computed
        for data in sets:
            division = split_trainval(data, labels, config.data.val_fraction, config.seed)
            if "finetune" in config.protocol:
                check_finetune_batch(division, config.finetune.batch_size, world)
    with close_with_resume_hint(open_transfer_folder(out, options, config, world)) as run:
        run.write_text(
            run.config_path, dump_yaml(config) + yaml.safe_dump({"run": make_transfer_record(job)}, sort_keys=False)
        )
        encoders = [
            make_loaded_encoder(n, r, config, device, run, console, world)
            for n, r in zip(job.encoders, references, strict=True)
        ]
        check_unique_encoders(encoders)
        cells = [
            evaluate_cell(seer, data, protocol, labels, config, run, console)
            for data in sets
            for protocol in config.protocol
            for labels in map(format_labels, config.labels)
            for seer in encoders
        ]
        results = {
            "cells": cells,
            "relative": reports.list_relative_improvements(cells, job.encoders, job.baselines),
            "encoders": {
                s.name: {"sha256": s.hash, "size": s.extractor.size, "crop_ratio": s.extractor.crop_ratio}
                for s in encoders
            },
            "baselines": list(job.baselines),
            "data": {data.name: make_data_record(data, config) for data in sets},
            "version": __version__,
        }
        run.write_json(run.results_path, results)
        if world.is_main:
            report_transfer(cells, job, run, console, format_sampling_notes(config))
    return {"run": str(run.path), **results}


def format_transfer_dry_run(resolved: ResolvedConfig, options: TransferOptions) -> str:
    """The resolved config and where each value comes from."""
    resolved = resume_transfer_config(resolved, options)
    resolve_transfer_job(resolved.config, options, World())
    return dump_yaml(resolved.config, resolved.origin).rstrip()


def report_transfer(
    cells: list[dict[str, Any]], job: TransferJob, run: RunFolder, console: Console, notes: list[str]
) -> None:
    """The table on stderr and as table.md with ``notes`` and more, and the chart."""
    header, rows = reports.build_transfer_table(cells, job.encoders, job.baselines)
    console.info("")
    console.print_table(header, rows)
    names = reports.shorten_encoder_names(job.encoders)
    notes = notes + [f"{names[name]} = {name}" for name in job.encoders if names[name] != name]
    notes += list(dict.fromkeys(f"{c['data']}, {c['labels']} labels: chosen on {c['validation']}" for c in cells))
    notes += [
        f"{c['encoder']} on {c['data']}, {c['protocol']}, {c['labels']} labels: {text}"
        for c in cells
        for text in c["warnings"]
    ]
    run.write_text(run.path / "table.md", reports.format_markdown(header, rows, notes))
    reports.plot_transfer_chart(run.path / "chart.png", cells, job.encoders, job.baselines)


def resume_transfer_config(resolved: ResolvedConfig, options: TransferOptions) -> ResolvedConfig:
    """The config, that of the folder to go on with where there is one."""
    if options.resume is None:
        return resolved
    out = get_transfer_folder(options)
    if out is None or not (out / "config.yaml").is_file():
        raise UsageError(f"--resume names no folder of results{f': {out}' * bool(out)}.", "Write --resume DIR.")
    return resolve_from_run(resolved, out / "config.yaml")


def resolve_transfer_job(config: Any, options: TransferOptions, world: World) -> tuple[TransferJob, Path]:
    """Which encoders, and where the results go; refusals that need no data come here."""
    sources = world.broadcast_from_main(
        lambda: [read_path_from_stdin(source) for source in options.sources]
    )  # one process reads stdin
    job, out = TransferJob(tuple(sources), options.baselines, options.network), get_transfer_folder(options)
    if options.resume is not None:
        assert out is not None
        before = yaml_io.load_mapping(out / "config.yaml")["run"]["job"]
        if job.network not in ("online", before["network"]):
            raise UsageError(
                f"{out} looks at the {before['network']} networks, not the {job.network} ones.", "Choose another --out."
            )
        job = TransferJob(
            job.sources or tuple(before["sources"]), job.baselines or tuple(before["baselines"]), before["network"]
        )
    elif out is not None:
        check_overwrite(out, overwrite=options.overwrite)
    if not job.sources:
        raise UsageError("No encoder is named.", "Give runs, files of weights, -, random or torchvision:NAME.")
    duplicates = [name for number, name in enumerate(job.encoders) if name in job.encoders[:number]]
    if duplicates:
        raise UsageError(f"The encoder {duplicates[0]} is named twice.", "Name every encoder once, baselines included.")
    if not config.data.datasets:
        raise UsageError("No data are named.", "Give --data NAME=DATA, or --preset byol-suite.")
    for labels in getattr(config, "labels", ()):  # dense tasks take all
        check_label_subset(format_labels(labels))
    return job, Path(world.broadcast_from_main(lambda: str(out or find_free_name(Path("runs"), "transfer"))))


def open_transfer_folder(out: Path, options: TransferOptions, config: Any, world: World) -> RunFolder:
    return open_or_create_run_folder(
        world, out, resumed=options.resume is not None, overwrite=options.overwrite, keep=config.checkpoint.keep
    )


@contextmanager
def close_with_resume_hint(run: RunFolder, options: str = "") -> Iterator[RunFolder]:
    """Close the folder after the block, and where a signal ended it, say how to go on."""
    try:
        yield run
    except (KeyboardInterrupt, Terminated) as stop:
        signum = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        command = f"relicctl transfer {options}--resume {shlex.quote(str(run.path))}"
        raise Interrupted("Stopped; finished cells are saved.", f"Go on with: {command}", signum) from None
    finally:
        run.close()


def make_transfer_record(job: TransferJob) -> dict[str, Any]:
    return {
        "version": __version__,
        "job": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(job).items()},
    }


def format_labels(labels: str | float) -> str:
    return labels if isinstance(labels, str) else f"{labels:g}"


def transfer_dense(resolved: ResolvedConfig, options: TransferOptions) -> dict[str, Any]:
    """Run or resume a comparison; returns ``run`` (the folder of results) and the content of results.json."""
    if isinstance(resolved.config, DetectionConfig):
        check_pycocotools()
    resolved = resume_transfer_config(resolved, options)
    with open_distributed_session(resolved.config.runtime, options.quiet) as session:
        return _run_dense_transfer(resolved.config, options, session.device, session.console, session.world)


def _run_dense_transfer(
    config: Any, options: TransferOptions, device: torch.device, console: Console, world: World
) -> dict[str, Any]:
    task_spec = DENSE_TASKS[type(config)]
    job, out = resolve_transfer_job(config, options, world)
    encoders = load_dense_encoders(job, config, console)
    sets = {name: task_spec.open_splits(name, spec, config, console) for name, spec in config.data.datasets.items()}
    with close_with_resume_hint(open_transfer_folder(out, options, config, world), f"--task {task_spec.name} ") as run:
        run.write_text(
            run.config_path, dump_yaml(config) + yaml.safe_dump({"run": make_transfer_record(job)}, sort_keys=False)
        )
        trainer = DenseTrainer(task_spec, config, device, run, console, world)
        cells = [trainer.evaluate_cell(learner, name, *parts) for name, parts in sets.items() for learner in encoders]
        results = {
            "cells": cells,
            "relative": reports.list_relative_improvements(cells, job.encoders, job.baselines),
            "encoders": {learner.name: {"sha256": learner.hash} for learner in encoders},
            "baselines": list(job.baselines),
            "data": {name: make_dense_data_record(config.data.datasets[name], *parts) for name, parts in sets.items()},
            "version": __version__,
        }
        run.write_json(run.results_path, results)
        if world.is_main:
            report_dense_transfer(cells, job, config, run, console)
    return {"run": str(run.path), **results}


def format_dense_dry_run(resolved: ResolvedConfig, options: TransferOptions) -> str:
    """The resolved config and where each value comes from."""
    resolved = resume_transfer_config(resolved, options)
    resolve_transfer_job(resolved.config, options, World())
    return dump_yaml(resolved.config, resolved.origin).rstrip()


def report_dense_transfer(
    cells: list[dict[str, Any]], job: TransferJob, config: Any, run: RunFolder, console: Console
) -> None:
    """The table on stderr and as table.md, and the chart."""
    header, rows = reports.build_transfer_table(cells, job.encoders, job.baselines)
    console.info("")
    console.print_table(header, rows)
    names = reports.shorten_encoder_names(job.encoders)
    notes = [f"{names[name]} = {name}" for name in job.encoders if names[name] != name]
    notes.append("the encoder is frozen" if config.model.freeze_encoder else "the encoder is fine-tuned")
    notes.append(f"{config.optim.steps} steps of {config.optim.batch_size} images; tested on val after the last")
    for cell in cells:
        figures = ", ".join(f"{k} {v:.3f}" for k, v in cell["figures"].items() if isinstance(v, float))
        first, last = cell["loss"]
        notes.append(f"{cell['encoder']} on {cell['data']}: {figures}; loss {first:.3f} at first, {last:.3f} at last")
    run.write_text(run.path / "table.md", reports.format_markdown(header, rows, notes))
    reports.plot_transfer_chart(run.path / "chart.png", cells, job.encoders, job.baselines)
