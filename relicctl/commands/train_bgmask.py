"""``relicctl train-bgmask``: from unlabelled images to a network that finds objects, and a mask for every image."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from relicctl.bgmask.data import IMAGES, MASKS, open_bgmask_data, open_bgmask_record
from relicctl.bgmask.dry_run import check_training_memory
from relicctl.bgmask.network import SALIENCY_FILE_NAME, init_saliency_net
from relicctl.bgmask.pipeline import MaskPipeline, report_bgmask, summarize_masks, summarize_priors
from relicctl.bgmask.self_training import count_total_steps
from relicctl.commands.common import choose_results_folder, save_config
from relicctl.config.base import list_specs
from relicctl.config.resolve import ResolvedConfig
from relicctl.data.datasets.specs import join_spec
from relicctl.data.mask_bank import MaskBank
from relicctl.data.value_range import warn_unused_range
from relicctl.runs.distributed import Session, open_distributed_session, open_or_create_run_folder
from relicctl.runs.folder import check_outside_data, check_overwrite
from relicctl.runs.resume import TrainingOptions, resolve_run
from relicctl.runs.training import log_start
from relicctl.version import __version__


def train_bgmask(resolved: ResolvedConfig, options: TrainingOptions) -> dict[str, Any]:
    """Run or resume a training of masks; return ``run`` (its folder) and the content of results.json."""
    resolved, resumed = resolve_run(resolved, options)
    if resumed is None and options.out is not None:
        check_overwrite(options.out, overwrite=options.overwrite)
    with open_distributed_session(resolved.config.runtime, options.quiet) as session:
        return _run_bgmask(resolved, options, resumed, session)


def _run_bgmask(
    resolved: ResolvedConfig, options: TrainingOptions, resumed: Path | None, session: Session
) -> dict[str, Any]:
    config, world = resolved.config, session.world
    data = open_bgmask_data(config, options.download, world, session.console)
    warn_unused_range(data.train, session.console.warn)
    out = choose_results_folder(resumed or options.out, Path("runs"), resolved.preset or "train-bgmask", world)
    if resumed is None:
        truth = [join_spec(config.data.eval, part) for part in (IMAGES, MASKS)] if config.data.eval else []
        check_outside_data(out, (*config.data.train, *list_specs(config.data.mask_data), *truth))
    record = open_bgmask_record(resumed, resolved, data, session.device)
    total = count_total_steps(config, len(data.train))
    world.get_local_rows(config.optim.batch_size)  # refuses an uneven batch before anything is computed
    if not (out / SALIENCY_FILE_NAME).is_file():  # else all networks are trained
        net = init_saliency_net(config, warn=session.console.warn)
        check_training_memory(config, net, len(data.train), record["precision"], session)

    run = open_or_create_run_folder(
        world, out, resumed=resumed is not None, overwrite=options.overwrite, keep=config.checkpoint.keep
    )
    resume_command = f"relicctl train-bgmask --resume {shlex.quote(str(run.path))}"
    with run.track_status() as status:
        save_config(run, config, record)
        status.set_total(total=total, steps_per_epoch=0, resume=resume_command)
        context = session.with_run(run, record["precision"])
        log_start(resolved, options, context, images=len(data.train), steps=total)
        pipeline = MaskPipeline(config, data, context)
        images, priors = pipeline.load_images(), pipeline.compute_priors()
        table = pipeline.evaluate_priors()
        net = pipeline.train(images, priors, table, resume_command)
        pipeline.make_masks(net, priors)

        def save_results() -> dict[str, Any]:
            pipeline.draw_sheet(images, priors, net)
            results = {
                "stages": table.rows if table else [],
                **summarize_priors(priors),
                "masks": summarize_masks(MaskBank.open(run.path)),
                "eval": config.data.eval,
                "images": len(images),
                "bad_images": len(run.read_bad_images()),
                "preset": resolved.preset,
                "version": __version__,
            }
            run.write_json(run.results_path, results)
            report_bgmask(results, session.console)
            return results

        results = world.broadcast_from_main(save_results)
    return {"run": str(run.path), **results}
