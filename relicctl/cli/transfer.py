"""``relicctl transfer``: options and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from relicctl.cli import options as opt
from relicctl.cli.options import option, print_result, print_run, resolve_options, set_option
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
        opt.Texts,
        typer.Argument(
            metavar="RUN|WEIGHTS|-",
            help="Encoders; - reads a path from stdin. Also random[:RUN], pixels[:RUN], torchvision:NAME.",
        ),
    ] = None,
    data: Annotated[
        opt.Texts,
        option("NAME=DATA", "Data with train, test and optionally val in it, or with {split} in its name; repeatable."),
    ] = None,
    baselines: Annotated[
        opt.Texts,
        option("ENCODER", "Baseline encoder; relative improvement is reported against it. Repeatable.", "--baseline"),
    ] = None,
    protocol: Annotated[
        opt.Texts, option("logistic|knn|finetune", "Evaluation protocol; repeatable. [logistic]")
    ] = None,
    task: Annotated[str, option("classification|segmentation|detection", "Evaluation task.")] = "classification",
    labels: Annotated[
        opt.Texts,
        option(
            "all|FRACTION|N-per-class|FILE",
            "Labelled subset: all, a fraction, N per class, or a list; repeatable. [all]",
        ),
    ] = None,
    network: opt.NetworkChoice = "online",
    preset: Annotated[
        opt.Text, option("NAME", "byol-suite, finetune-quick, voc-segmentation, ...; see `presets ls`.")
    ] = None,
    config: opt.ConfigFile = None,
    sets: Annotated[opt.Texts, set_option("data.metrics={x: map11}")] = None,
    out: Annotated[Path | None, option("DIR", "Results folder (default: a new one).")] = None,
    resume: Annotated[
        opt.Text, option("[DIR]", "Resume. Default: the results in --out. Finished cells are reused.")
    ] = None,
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
    download: opt.Download = False,
    device: opt.Device = None,
    workers: opt.Workers = None,
    seed: opt.Seed = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Compare encoders on other data sets; prints the folder of the results."""
    from relicctl.commands import transfer as command
    from relicctl.commands.common import parse_named_data
    from relicctl.runs.resume import TransferOptions, find_resume_of_results

    classification = {"protocol": protocol or None, "labels": labels or None}
    for name, value in classification.items():
        if value and task != "classification":
            raise UsageError(f"--{name} has no effect on --task {task}.", "Leave it out.")
    options: dict[str, Any] = {"device": device, "workers": workers, "seed": seed, **classification}
    options["data"] = parse_named_data(tuple(data or ())) or None
    transfer_options = TransferOptions(
        sources=tuple(sources or ()), baselines=tuple(baselines or ()), network=network,
        out=out, resume=find_resume_of_results(resume, out), overwrite=overwrite, download=download, quiet=quiet,
    )  # fmt: skip
    resolved = resolve_options(preset, config, sets, options, _get_schema(task), transfer_options)
    if dry_run:
        print_result(command.format_transfer_dry_run(resolved, transfer_options))
        return
    print_run(command.transfer(resolved, transfer_options), as_json)


def _get_schema(task: str) -> Any:
    from relicctl.config.transfer import DetectionConfig, SegmentationConfig, TransferConfig

    schemas = {"classification": TransferConfig, "segmentation": SegmentationConfig, "detection": DetectionConfig}
    if task not in schemas:
        raise UsageError(f"There is no task {task!r}.", "Give --task classification, segmentation or detection.")
    return schemas[task]
