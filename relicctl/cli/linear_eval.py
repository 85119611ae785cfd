"""``relicctl linear-eval``: options and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relicctl.cli import options as opt
from relicctl.cli.options import join_data, option, print_result, print_run, resolve_options, set_option

EXAMPLES = """\b
Examples:
  relicctl linear-eval runs/demo
  relicctl linear-eval random:runs/demo
  relicctl linear-eval runs/demo --test swapped=shapes:backgrounds=swapped
  relicctl linear-eval runs/demo random:runs/demo pixels:runs/demo --analysis
  relicctl linear-eval torchvision:resnet50 --data birds.zip#train --val birds.zip#val
  relicctl linear-eval --preset linear-imagenet runs/r50 --data imagenet/train --val imagenet/val
  relicctl pretrain --preset demo | relicctl linear-eval -"""


def linear_eval(
    sources: Annotated[
        opt.Texts,
        typer.Argument(
            metavar="RUN|WEIGHTS|-",
            help="The encoder; - reads a path from stdin. Also random[:RUN], pixels[:RUN], torchvision:NAME. "
            "More than one with --analysis.",
        ),
    ] = None,
    data: Annotated[
        opt.Texts, option("DATA", "Labelled training images (default: the run's); repeatable.", "--data")
    ] = None,
    val: Annotated[opt.Texts, option("DATA", "Labelled images to test on; repeatable.")] = None,
    tests: Annotated[
        opt.Texts, option("NAME=DATA", "Additional test set, with classes matched by name; repeatable.", "--test")
    ] = None,
    analysis: Annotated[
        bool, typer.Option("--analysis", help="Cluster analysis of the test images' features, with a t-SNE plot.")
    ] = False,
    network: opt.NetworkChoice = "online",
    preset: Annotated[
        opt.Text, option("NAME", "linear-imagenet for the ImageNet protocol (default: the fast one).")
    ] = None,
    config: opt.ConfigFile = None,
    sets: Annotated[opt.Texts, set_option("sweep.lrs=[0.3]")] = None,
    out: Annotated[Path | None, option("DIR", "Results folder (default: a new one in the encoder's run).")] = None,
    resume: Annotated[opt.Text, option("[DIR]", "Resume an evaluation. Default: the one in --out.")] = None,
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
    """Train a linear classifier on an encoder's frozen features; prints the folder of the results."""
    from relicctl.commands import linear_eval as command
    from relicctl.config.linear_eval import LinearEvalConfig
    from relicctl.runs.resume import LinearOptions, find_resume_of_results

    options = {"data": join_data(data), "val": join_data(val), "device": device, "workers": workers, "seed": seed}
    linear_options = LinearOptions(
        sources=tuple(sources or ()), network=network, tests=tuple(tests or ()), analysis=analysis,
        out=out, resume=find_resume_of_results(resume, out), overwrite=overwrite, download=download, quiet=quiet,
    )  # fmt: skip
    resolved = resolve_options(preset, config, sets, options, LinearEvalConfig, linear_options)
    if dry_run:
        print_result(command.format_linear_dry_run(resolved, linear_options))
        return
    print_run(command.linear_eval(resolved, linear_options), as_json)
