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
from relicctl.commands.options import BgmaskOptions
from relicctl.commands.pretrain import refuse_inside
from relicctl.commands.processes import joined, owned
from relicctl.config.bgmask import BgmaskConfig
from relicctl.config.resolve import Resolved, dump_yaml
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.data.masks import MaskBank
from relicctl.runs import RunFolder, free_name, refuse_occupied
from relicctl.saliency.nets import FILE_NAME, open_net

dry_run = bgmask_job.dry_run


def train_bgmask(resolved: Resolved, options: BgmaskOptions) -> dict[str, Any]:
    """Run or resume a training of masks; returns ``run`` (its folder) and the content of results.json."""
    resolved, resumed = bgmask_job.settle(resolved, options)
    if resumed is None and options.out is not None:
        refuse_occupied(options.out, overwrite=options.overwrite)
    with joined(resolved.config.runtime, options.quiet) as (world, device, console):
        return _run(resolved, options, resumed, world, device, console)


def _run(
    resolved: Resolved,
    options: BgmaskOptions,
    resumed: Path | None,
    world: World,
    device: torch.device,
    console: Console,
) -> dict[str, Any]:
    config = resolved.config
    data = bgmask_job.open_data(config, options.download, world)
    named = resumed or options.out
    out = named or Path(world.lead(lambda: str(free_name(Path("runs"), resolved.preset or "train-bgmask"))))
    for spec in (*config.data.train, config.data.masks_for):
        refuse_inside(out, spec)
    record = (
        bgmask_job.continued_record(out, resolved, data, device)
        if resumed
        else bgmask_job.new_record(resolved, data, device)
    )
    total = bgmask_job.steps(config, len(data.train))
    world.rows(config.optim.batch_size)  # before anything is computed
    if not (out / FILE_NAME).is_file():  # else no network is trained any more
        net = open_net(config)
        bgmask_job.check_memory(config, net, len(data.train), device, record["precision"], world.size, console)

    run = open_run(out, config, resumed is not None, options.overwrite, world)
    resume_command = f"relicctl train-bgmask --resume {shlex.quote(str(run.path))}"
    with run.watched() as status:
        run.write_text(run.config, dump_yaml(config) + yaml.safe_dump({"run": record}, sort_keys=False))
        status.expect(total=total, steps_per_epoch=0, resume=resume_command)
        work = Work(run, config, data, device, record["precision"], console, world)
        photos, store = work.photos(), work.priors()
        table = work.table()
        net = work.train(photos, store, table, resume_command)
        work.make_masks(net, store)

        def concluded() -> dict[str, Any]:
            work.sheet(photos, store, net)
            results = {
                "stages": table.rows if table else [],
                **of_priors(store),
                "masks": of_masks(MaskBank.open(run.path)),
                "eval": config.data.eval,
                "images": len(photos),
                "bad_images": len(run.read_bad_images()),
                "preset": resolved.preset,
                "version": __version__,
            }
            run.write_json(run.results, results)
            report(results, console)
            return results

        results = world.lead(concluded)
    return {"run": str(run.path), **results}


def open_run(out: Path, config: BgmaskConfig, resumed: bool, overwrite: bool, world: World) -> RunFolder:
    keep = config.checkpoint.keep
    if resumed:
        return owned(world, lambda: RunFolder.reopen(out, keep=keep), out, keep)
    return owned(world, lambda: RunFolder.create(out, overwrite=overwrite, keep=keep), out, keep)
