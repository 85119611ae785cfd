"""``relicctl train-bgmask``: from unlabelled images to a network that finds objects, and a mask for every image."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
import yaml

from relicctl.bgmask.data import make_bgmask_record, open_bgmask_data, resolve_bgmask_run, resume_bgmask_record
from relicctl.bgmask.dry_run import check_training_memory, count_training_steps
from relicctl.bgmask.network import SALIENCY_FILE_NAME, init_saliency_net
from relicctl.bgmask.pipeline import MaskPipeline, report_bgmask, summarize_masks, summarize_priors
from relicctl.config.resolve import ResolvedConfig, dump_yaml
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.data.mask_bank import MaskBank
from relicctl.runs.distributed import open_distributed_session, open_or_create_run_folder
from relicctl.runs.folder import check_outside_data, check_overwrite, find_free_name
from relicctl.runs.resume import BgmaskOptions
from relicctl.version import __version__


def train_bgmask(resolved: ResolvedConfig, options: BgmaskOptions) -> dict[str, Any]:
    """Run or resume a training of masks; returns ``run`` (its folder) and the content of results.json."""
    resolved, resumed = resolve_bgmask_run(resolved, options)
    if resumed is None and options.out is not None:
        check_overwrite(options.out, overwrite=options.overwrite)
    with open_distributed_session(resolved.config.runtime, options.quiet) as session:
        return _run_bgmask(resolved, options, resumed, session.world, session.device, session.console)


def _run_bgmask(
    resolved: ResolvedConfig,
    options: BgmaskOptions,
    resumed: Path | None,
    world: World,
    device: torch.device,
    console: Console,
) -> dict[str, Any]:
    config = resolved.config
    data = open_bgmask_data(config, options.download, world)
    requested_out = resumed or options.out
    out = requested_out or Path(
        world.broadcast_from_main(lambda: str(find_free_name(Path("runs"), resolved.preset or "train-bgmask")))
    )
    for spec in (*config.data.train, config.data.masks_for):
        check_outside_data(out, spec)
    record = (
        resume_bgmask_record(out, resolved, data, device) if resumed else make_bgmask_record(resolved, data, device)
    )
    total = count_training_steps(config, len(data.train))
    world.get_local_rows(config.optim.batch_size)  # before anything is computed
    if not (out / SALIENCY_FILE_NAME).is_file():  # else no network is trained any more
        net = init_saliency_net(config)
        check_training_memory(config, net, len(data.train), device, record["precision"], world.size, console)

    run = open_or_create_run_folder(
        world, out, resumed=resumed is not None, overwrite=options.overwrite, keep=config.checkpoint.keep
    )
    resume_command = f"relicctl train-bgmask --resume {shlex.quote(str(run.path))}"
    with run.track_status() as status:
        run.write_text(run.config_path, dump_yaml(config) + yaml.safe_dump({"run": record}, sort_keys=False))
        status.set_total(total=total, steps_per_epoch=0, resume=resume_command)
        pipeline = MaskPipeline(run, config, data, device, record["precision"], console, world)
        photos, store = pipeline.load_images(), pipeline.compute_priors()
        table = pipeline.evaluate_priors()
        net = pipeline.train(photos, store, table, resume_command)
        pipeline.make_masks(net, store)

        def save_results() -> dict[str, Any]:
            pipeline.draw_sheet(photos, store, net)
            results = {
                "stages": table.rows if table else [],
                **summarize_priors(store),
                "masks": summarize_masks(MaskBank.open(run.path)),
                "eval": config.data.eval,
                "images": len(photos),
                "bad_images": len(run.read_bad_images()),
                "preset": resolved.preset,
                "version": __version__,
            }
            run.write_json(run.results_path, results)
            report_bgmask(results, console)
            return results

        results = world.broadcast_from_main(save_results)
    return {"run": str(run.path), **results}
