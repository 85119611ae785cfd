"""``relicctl pretrain``: options and help."""

from __future__ import annotations

from typing import Annotated

from relicctl.cli import options as opt
from relicctl.cli.options import (
    handle_early_interrupt,
    join_data,
    option,
    print_result,
    print_run,
    resolve_options,
    take_single,
)

EXAMPLES = """\b
Examples:
  relicctl pretrain --preset demo
  relicctl pretrain --preset demo --dry-run
  relicctl pretrain --preset demo --set optim.max_steps=20 --out runs/short
  relicctl pretrain --preset cifar10-r18 --download --device auto
  relicctl train-bgmask --preset demo-bgmask | relicctl pretrain --preset demo --bgmask -
  relicctl pretrain --resume runs/short"""


def pretrain(
    preset: opt.Preset = None,
    config: opt.ConfigFile = None,
    sets: opt.Sets = None,
    data: Annotated[
        opt.Texts,
        option(
            "DATA",
            "Training images: folder, .zip, .tar, torchvision:NAME or shapes [#subfolder]; repeatable, then all are "
            "trained on together.",
            "--data",
        ),
    ] = None,
    val: Annotated[opt.Texts, option("DATA", "Labelled images to evaluate on; repeatable.")] = None,
    bgmask: Annotated[
        opt.Texts,
        option("RUN|BANK|-", "Background masks of the training images: a run of train-bgmask, or its mask bank."),
    ] = None,
    out: opt.RunFolder = None,
    resume: Annotated[
        opt.Text,
        option(
            "[RUN]", "Resume a run. Default: the run in --out (started if missing), else the latest of this preset."
        ),
    ] = None,
    overwrite: opt.OverwriteRun = False,
    init_from: Annotated[opt.Text, option("WEIGHTS", "Start the encoder from these weights or this run.")] = None,
    dry_run: opt.DryRunWithCost = False,
    download: opt.Download = False,
    device: opt.Device = None,
    workers: opt.Workers = None,
    seed: opt.Seed = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Train an encoder on images, without their labels; prints the run's folder."""
    with handle_early_interrupt():
        from relicctl.config.pretrain import PretrainConfig
        from relicctl.runs.resume import TrainingOptions

    images = {"data": join_data(data), "val": join_data(val), "bgmask": take_single(bgmask, "bgmask")}
    options = {**images, "device": device, "workers": workers, "seed": seed}
    pretrain_options = TrainingOptions(
        out=out, resume=resume, overwrite=overwrite, init_from=init_from, download=download, json=as_json, quiet=quiet
    )
    resolved = resolve_options(preset, config, sets, options, PretrainConfig, pretrain_options)
    if dry_run:
        from relicctl.pretraining import estimate

        print_result(estimate.format_pretrain_dry_run(resolved, pretrain_options))
        return
    with handle_early_interrupt():
        from relicctl.commands import pretrain as command

        result = command.pretrain(resolved, pretrain_options)
    print_run(result, as_json)
