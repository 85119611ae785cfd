"""``relicctl train-bgmask``: options and help."""

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
    set_option,
    take_single,
)

EXAMPLES = """\b
Examples:
  relicctl train-bgmask --preset demo-bgmask --eval-data shapes
  relicctl train-bgmask --preset demo-bgmask | relicctl pretrain --preset demo --bgmask -
  relicctl train-bgmask --preset u2netp --data photos.zip --data more/ --eval-data ecssd.zip
  relicctl train-bgmask --preset u2netp --data photos.zip --dry-run
  relicctl train-bgmask --resume runs/u2netp
  relicctl train-bgmask --resume runs/u2netp --masks-for imagenet/train"""


def train_bgmask(
    preset: opt.Preset = None,
    config: opt.ConfigFile = None,
    sets: Annotated[opt.Texts, set_option("optim.epochs=5")] = None,
    data: Annotated[
        opt.Texts,
        option(
            "DATA",
            "Unlabelled images: folder, .zip, .tar, torchvision:NAME or shapes [#subfolder]; repeatable, then "
            "all are trained on together, and the first gets the masks.",
            "--data",
        ),
    ] = None,
    eval_data: Annotated[
        opt.Texts,
        option(
            "DATA",
            "Images with ground-truth masks, for evaluation only: a folder or archive with images/ and masks/, "
            "or shapes.",
        ),
    ] = None,
    masks_for: Annotated[
        opt.Texts, option("DATA", "Images to generate masks for (default: the first --data); repeatable.")
    ] = None,
    init_from: Annotated[
        opt.Text, option("RUN|WEIGHTS", "Encoder that model.arch=resnet starts from: one trained without labels.")
    ] = None,
    out: opt.RunFolder = None,
    resume: Annotated[
        opt.Text, option("[RUN]", "Resume a run. Default: the run in --out, else the latest of this preset.")
    ] = None,
    overwrite: opt.OverwriteRun = False,
    dry_run: opt.DryRunWithCost = False,
    download: opt.Download = False,
    device: opt.Device = None,
    workers: opt.Workers = None,
    seed: opt.Seed = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Learn object masks from unlabelled images and create one for each image; prints the run's folder."""
    with handle_early_interrupt():
        from relicctl.config.bgmask import BgmaskConfig
        from relicctl.runs.resume import TrainingOptions

    images = {
        "data": join_data(data),
        "eval-data": take_single(eval_data, "eval-data"),
        "masks-for": join_data(masks_for),
    }
    options = {**images, "init-from": init_from, "device": device, "workers": workers, "seed": seed}
    bgmask_options = TrainingOptions(
        out=out, resume=resume, overwrite=overwrite, init_from=init_from, download=download, json=as_json, quiet=quiet
    )
    resolved = resolve_options(preset, config, sets, options, BgmaskConfig, bgmask_options)
    with handle_early_interrupt():
        from relicctl.bgmask.dry_run import format_bgmask_dry_run
        from relicctl.commands import train_bgmask as command

        if dry_run:
            print_result(format_bgmask_dry_run(resolved, bgmask_options))
            return
        result = command.train_bgmask(resolved, bgmask_options)
    print_run(result, as_json)
