"""``relicctl transfer``: options and help."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from relicctl.cli.options import (
    AsJson,
    ConfigFile,
    Debug,
    Device,
    Download,
    DryRun,
    NetworkChoice,
    Overwrite,
    Quiet,
    Seed,
    Workers,
    print_result,
    resolve_options,
)
from relicctl.errors import UsageError

EXAMPLES = """\b
Examples:
  relicctl transfer runs/demo --baseline random --data shapes=shapes
  relicctl transfer runs/a runs/b --baseline torchvision:resnet50 --preset byol-suite --download
  relicctl transfer runs/a --data dtd=dtd.zip --protocol logistic --protocol knn --labels all --labels 0.1
  relicctl transfer runs/a --preset finetune-quick --data pets=pets-{split}.zip
  relicctl transfer runs/a --baseline random --task segmentation --data voc=VOCdevkit/VOC2012
  relicctl transfer runs/a --task detection --preset coco-detection --data coco=coco
  relicctl transfer --resume runs/transfer"""


def transfer(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|WEIGHTS|-",
            help="Encoders; - reads a path from stdin. Also random[:RUN], pixels[:RUN], torchvision:NAME.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DATA",
            help="Data with train, test and optionally val in it, or with {split} in its name; repeatable.",
        ),
    ] = None,
    baselines: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            metavar="ENCODER",
            help="Baseline encoder; relative improvement is reported against it. Repeatable.",
        ),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(metavar="logistic|knn|finetune", help="Evaluation protocol; repeatable. [logistic]"),
    ] = None,
    task: Annotated[
        str, typer.Option(metavar="classification|segmentation|detection", help="Evaluation task.")
    ] = "classification",
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="all|FRACTION|N-per-class|FILE",
            help="Labelled subset: all, a fraction, N per class, or a list; repeatable. [all]",
        ),
    ] = None,
    network: NetworkChoice = "online",
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="byol-suite, finetune-quick, voc-segmentation, ...; see `presets ls`."),
    ] = None,
    config: ConfigFile = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as in data.metrics={x: map11}; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Results folder (default: a new one).")] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="[DIR]", help="Resume. Default: the results in --out. Finished cells are reused."),
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    download: Download = False,
    device: Device = None,
    workers: Workers = None,
    seed: Seed = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare encoders on other data sets; prints the folder of the results."""
    from relicctl.commands import transfer as command
    from relicctl.commands.common import parse_named_data
    from relicctl.runs.resume import TransferOptions

    options = {
        "data": parse_named_data(tuple(data or ())) or None,
        "protocol": protocol or None,
        "labels": labels or None,
        "device": device,
        "workers": workers,
        "seed": seed,
    }
    for name in ("protocol", "labels"):
        if options[name] and task != "classification":
            raise UsageError(f"--{name} means nothing to --task {task}.", "Leave it out.")
    resolved = resolve_options(preset, config, sets, options, _get_schema(task))
    transfer_options = TransferOptions(
        sources=tuple(sources or ()), baselines=tuple(baselines or ()), network=network,
        out=out, resume=resume, overwrite=overwrite, download=download, quiet=quiet,
    )  # fmt: skip
    if dry_run:
        print_result(command.format_transfer_dry_run(resolved, transfer_options))
        return
    result = command.transfer(resolved, transfer_options)
    if os.environ.get("RANK", "0") == "0":  # of a process group, one process prints
        print_result(json.dumps(result) if as_json else result["run"])


def _get_schema(task: str) -> Any:
    """The schema of the task's config."""
    from relicctl.config.transfer import DetectionConfig, SegmentationConfig, TransferConfig

    schemas = {"classification": TransferConfig, "segmentation": SegmentationConfig, "detection": DetectionConfig}
    if task not in schemas:
        raise UsageError(f"There is no task {task!r}.", "Give --task classification, segmentation or detection.")
    return schemas[task]
