"""``relicctl train-bgmask``: from unlabelled images to a network that finds objects, and a mask for every image."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
import yaml

from relicctl import __version__
from relicctl.commands import bgmask_job
from relicctl.commands.bgmask_work import Work, of_masks, of_priors, report
from relicctl.commands.common import pick_device
from relicctl.commands.options import BgmaskOptions
from relicctl.commands.pretrain import refuse_inside
from relicctl.config.bgmask import BgmaskConfig
from relicctl.config.resolve import Resolved, dump_yaml
from relicctl.console import Console
from relicctl.runs import RunFolder, free_name, refuse_occupied
from relicctl.saliency.nets import open_net

dry_run = bgmask_job.dry_run


def train_bgmask(resolved: Resolved, options: BgmaskOptions) -> dict[str, Any]:
    """Run or resume a training of masks; returns ``run`` (its folder) and the content of results.json."""
    resolved, resumed = bgmask_job.settle(resolved, options)
    if resumed is None and options.out is not None:
        refuse_occupied(options.out, overwrite=options.overwrite)
    config = resolved.config
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    console, device = Console(options.quiet), pick_device(config.runtime.device)
    data = bgmask_job.open_data(config, options.download)
    out = resumed or options.out or free_name(Path("runs"), resolved.preset or "train-bgmask")
    for spec in (*config.data.train, config.data.masks_for):
        refuse_inside(out, spec)
    record = (
        bgmask_job.continued_record(out, resolved, data, device)
        if resumed
        else bgmask_job.new_record(resolved, data, device)
    )
    total = bgmask_job.steps(config, len(data.train))
    bgmask_job.check_memory(config, open_net(config), len(data.train), device, record["precision"], console)

    run = open_run(out, config, resumed is not None, options.overwrite)
    resume_command = f"relicctl train-bgmask --resume {shlex.quote(str(run.path))}"
    with run.watched() as status:
        run.write_text(run.config, dump_yaml(config) + yaml.safe_dump({"run": record}, sort_keys=False))
        status.expect(total=total, steps_per_epoch=0, resume=resume_command)
        work = Work(run, config, data, device, record["precision"], console)
        photos, store = work.photos(), work.priors()
        table = work.table()
        net = work.train(photos, store, table, resume_command)
        bank = work.masks(net)
        work.sheet(photos, store, net)
        results = {
            "stages": table.rows if table else [],
            **of_priors(store),
            "masks": of_masks(bank),
            "eval": config.data.eval,
            "images": len(photos),
            "bad_images": len(run.read_bad_images()),
            "preset": resolved.preset,
            "version": __version__,
        }
        run.write_json(run.results, results)
        report(results, console)
    return {"run": str(run.path), **results}


def open_run(out: Path, config: BgmaskConfig, resumed: bool, overwrite: bool) -> RunFolder:
    if resumed:
        return RunFolder.reopen(out, keep=config.checkpoint.keep)
    return RunFolder.create(out, overwrite=overwrite, keep=config.checkpoint.keep)
