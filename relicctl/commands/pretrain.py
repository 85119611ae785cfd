"""``relicctl pretrain``: from a folder of images to an encoder."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from relicctl.config.pretrain import PretrainConfig
from relicctl.config.resolve import ResolvedConfig, dump_yaml
from relicctl.console import Console
from relicctl.core import checkpoint
from relicctl.core.distributed import World, destroy_distributed, init_distributed
from relicctl.core.loop import LoopConfig, TrainState, restore_state, train
from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.data.decoding import BadImages
from relicctl.data.loader import LoaderConfig, ViewLoader, resolve_cache
from relicctl.data.sampler import Sampler
from relicctl.encoders.file import load_encoder, save_encoder
from relicctl.errors import DataError, UsageError
from relicctl.evaluation.online import CollapseMonitor
from relicctl.pretraining.data import (
    PretrainData,
    build_evaluator,
    build_view_plan,
    check_same_images,
    check_same_mask_bank,
    log_missing_masks,
    open_masking,
    open_pretrain_data,
    resolve_bank_path,
)
from relicctl.pretraining.estimate import check_step_memory, check_view_memory
from relicctl.pretraining.task import PretrainTask, Schedule, resolve_precision
from relicctl.runs.curves import plot_curves
from relicctl.runs.distributed import (
    SharedBadImages,
    load_newest_checkpoint,
    resolve_device,
    resolve_num_workers,
    select_progress_metrics,
)
from relicctl.runs.folder import RunFolder, check_outside_data, check_overwrite, find_free_name
from relicctl.runs.resume import PretrainOptions, find_run_to_resume, read_resumable_record, resume_config
from relicctl.version import __version__


def pretrain(resolved: ResolvedConfig, options: PretrainOptions) -> dict[str, Any]:
    """Run or resume a pretraining; returns ``run`` (its folder) and the figures of results.json."""
    resumed = find_run_to_resume(options, resolved.preset) if options.resume is not None else None
    if resumed is not None:
        resolved = resume_config(resolved, resumed)
    elif options.out is not None:
        check_overwrite(options.out, overwrite=options.overwrite)
    config = resolved.config
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    device = resolve_device(config.runtime.device)
    world = init_distributed(device.type)
    with ExitStack() as exit_stack:
        exit_stack.callback(destroy_distributed)
        if device.type == "cuda":
            device = torch.device("cuda", world.local_rank)
            torch.cuda.set_device(device)
        return _run_pretrain(
            resolved, options, resumed, Console(options.quiet or not world.is_main), device, world, exit_stack
        )


def _run_pretrain(
    resolved: ResolvedConfig,
    options: PretrainOptions,
    resumed: Path | None,
    console: Console,
    device: torch.device,
    world: World,
    exit_stack: ExitStack,
) -> dict[str, Any]:
    config = resolved.config
    data = open_pretrain_data(config, options.download, console)
    sampler = Sampler(config.seed, len(data.train), config.optim.batch_size)
    schedule = Schedule(config, sampler.steps_per_epoch)
    check_batch_split(config, world)
    check_same_images(data.train, world)
    resolved = resolve_bank_path(resolved)  # memory may be taken until then by what makes the bank
    config = resolved.config
    check_view_memory(config, device, world.size)
    out = resumed or options.out or find_free_name(Path("runs"), resolved.preset or "pretrain")
    check_outside_data(out, config.data.train)
    bad = BadImages(len(data.train), config.data.max_corrupt_fraction)
    evaluator = build_evaluator(config, data, device, bad, console)
    log_missing_masks(resolved, console)
    masking, masks = open_masking(config, data.train, console)
    if resumed:
        record = resume_pretrain_record(out, resolved, data, masks, device)
    else:
        record = make_pretrain_record(resolved, options, data, masks, device)
    check_step_memory(config, len(data.train.classes), device, record["precision"], world.size, console)
    task = PretrainTask(
        config,
        schedule,
        classes=len(data.train.classes),
        device=device,
        precision=record["precision"],
        world=world,
    )
    if resumed is None:
        load_initial_weights(record["init_from"], task)

    run = open_pretrain_run(out, config, resumed is not None, options.overwrite, world)
    run.write_text(run.config_path, dump_yaml(config) + yaml.safe_dump({"run": record}, sort_keys=False))
    status = exit_stack.enter_context(run.track_status())
    plan = LoopConfig(
        total=schedule.last_step,
        steps_per_epoch=sampler.steps_per_epoch,
        batch_size=config.optim.batch_size,
        log_every=config.runtime.log_every,
        evaluate_every=config.eval.every_epochs * sampler.steps_per_epoch,
        checkpoint_every=config.checkpoint.every_steps,
        checkpoint_minutes=config.checkpoint.every_minutes,
        resume_command=f"relicctl pretrain --resume {shlex.quote(str(run.path))}",
    )
    status.set_total(total=plan.total, steps_per_epoch=plan.steps_per_epoch, resume=plan.resume_command)
    pool = SharedBadImages(bad, run, world)
    pool.load_recorded(data.train)
    if evaluator is not None:
        evaluator.bad_held_out.report = run.add_bad_image
    try:
        feed = ViewLoader(
            data.train,
            sampler,
            build_view_plan(config),
            LoaderConfig(
                config.seed,
                device,
                world,
                cache=record["cache"],
                strict_cache=config.data.cache == "device",
                workers=resolve_num_workers(config.runtime, device, record["cache"]),
            ),
            bad,
            masking,
        )
    except UsageError:
        if resumed is None:
            run.delete()
        raise
    evaluate = None
    if evaluator is not None:
        evaluate = status.wrap_in_state("evaluating", lambda step: evaluator(task.encoder, world))

    progress = resume_training(run, task, record["init_from"], console, world) if resumed is not None else None
    if progress is None:
        progress = evaluate_untrained(evaluate, run, console)
    with console.progress(plan.total, progress.step) as progress_bar:
        collapse_monitor = CollapseMonitor(console.warn, config.optim.batch_size, task.num_candidates)

        def log_progress(step: int, figures: dict[str, Any]) -> None:
            progress_bar.update(step, select_progress_metrics(figures))
            collapse_monitor(step, figures)
            pool.sync()

        progress = train(
            task,
            status.add_heartbeat(feed),
            plan,
            run,
            state=progress,
            device=device,
            world=world,
            evaluate=evaluate,
            on_log=log_progress,
        )
    results = {
        "objective": config.objective,
        "steps": progress.step,
        "epochs": round(progress.step / sampler.steps_per_epoch, 4),
        **{key: progress.eval_metrics.get(key) for key in ("untrained_knn20", "knn20", "knn200", "probe_top1")},
        "protocol": evaluator.protocol if evaluator else None,
        "images": len(data.train),
        "bad_images": len(bad.seen),
        "bad_val_images": len(evaluator.bad_held_out.seen) if evaluator else 0,
        "bgmask": masks,
        "preset": resolved.preset,
        "version": __version__,
    }
    if world.is_main:
        save_pretrain_results(run, task, config, resolved.preset, results)
        print_accuracy(results, console)
    return {"run": str(run.path), **results}


def check_batch_split(config: PretrainConfig, world: World) -> None:
    """Raises UsageError if the batch cannot be split over the processes, or a process's share into microbatches."""
    first, last = world.get_local_rows(config.optim.batch_size)
    microbatch = config.optim.microbatch
    if microbatch is not None and (last - first) % microbatch:
        raise UsageError(
            f"optim.microbatch {microbatch} does not divide the {last - first} images of a process.",
            "Choose one that does, or another number of processes.",
        )


def make_pretrain_record(
    resolved: ResolvedConfig, options: PretrainOptions, data: PretrainData, masks: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """What config.yaml says under ``run``: facts that a continuation must share."""
    return {
        "version": __version__,
        "preset": resolved.preset,
        "data_fingerprint": data.train.compute_fingerprint(),
        "images": len(data.train),
        "bgmask_sha256": masks.get("sha256"),
        "init_from": options.init_from,
        "cache": resolve_cache(resolved.config.data.cache, data.train, device, masks["masked_views"] > 0),
        "precision": resolve_precision(resolved.config, device),
    }


def resume_pretrain_record(
    run: Path, resolved: ResolvedConfig, data: PretrainData, masks: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """The facts noted at the start; the precision may be chosen anew. Raises DataError for other images or masks."""
    record = read_resumable_record(run)
    if record["data_fingerprint"] != data.train.compute_fingerprint():
        raise DataError(
            f"The images are not those that {run} was started with.",
            "Give --data the same images, or start another run with --init-from.",
        )
    check_same_mask_bank(run, record, masks)
    if resolved.origin["runtime.precision"] != "run":
        record["precision"] = resolve_precision(resolved.config, device)
    return record


def open_pretrain_run(out: Path, config: PretrainConfig, resumed: bool, overwrite: bool, world: World) -> RunFolder:
    if resumed:
        run = RunFolder.reopen(out, keep=config.checkpoint.keep, writer=world.is_main)
    else:
        run = RunFolder.create(out, overwrite=overwrite, keep=config.checkpoint.keep, writer=world.is_main)
    if config.runtime.tensorboard:
        run.start_tensorboard()
    return run


def load_initial_weights(weights: str | None, task: PretrainTask) -> None:
    """Put an encoder's weights into both networks. Raises UsageError if they do not fit."""
    if weights is None:
        return
    start, current = load_encoder(weights).state_dict(), task.encoder.state_dict()
    if {name: t.shape for name, t in start.items()} != {name: t.shape for name, t in current.items()}:
        raise UsageError(
            f"The weights of {weights} do not fit this encoder.",
            "Set model.arch, model.width and model.stem to theirs.",
        )
    for network in (task.model.online, task.model.target):
        if network is not None:
            network["encoder"].load_state_dict(start)


def evaluate_untrained(evaluate: Any, run: RunFolder, console: Console) -> TrainState:
    """Step 0: what the network is worth before training."""
    progress = TrainState()
    if evaluate is not None:
        figures = evaluate(0)
        progress.eval_metrics = {f"untrained_{name}": value for name, value in figures.items()}
        if figures:
            run.write_metrics({"step": 0, "epoch": 0.0, **figures})
            console.info(f"untrained: kNN(20) {figures['knn20']:.3f}")
    return progress


def resume_training(
    run: RunFolder, task: PretrainTask, init_from: str | None, console: Console, world: World
) -> TrainState | None:
    """Load the newest checkpoint that the main process can read; None for a run that ended before its first one."""
    loaded = load_newest_checkpoint(run, world, console.warn)
    if loaded is None:
        if checkpoint.list_checkpoints(run.checkpoints_dir):
            raise UsageError(f"No checkpoint in {run.checkpoints_dir} can be read.", "Start another run.")
        console.info(f"{run.path} has no checkpoint yet: starting at step 0")
        run.truncate_metrics(-1)
        load_initial_weights(init_from, task)
        return None
    path, tensors, header = loaded
    progress = restore_state(task, tensors, header, str(path))
    run.quarantine_after(progress.step)
    run.truncate_metrics(progress.step)
    console.info(f"resumed from {path} at step {progress.step}")
    return progress


def save_pretrain_results(
    run: RunFolder, task: PretrainTask, config: PretrainConfig, preset: str | None, results: dict[str, Any]
) -> None:
    metadata = {
        "version": __version__,
        "preset": preset or "",
        "objective": config.objective,
        "network": "online",
        "size": str(config.eval.size or config.views.large.size),
        "crop_ratio": str(config.eval.crop_pct),
        "mean": str(list(IMAGENET_MEAN)),
        "std": str(list(IMAGENET_STD)),
    }
    save_encoder(run.encoder_path, task.encoder, metadata)
    run.write_json(run.results_path, results)
    plot_curves(run.read_metrics(), run.curves_path, f"{preset or 'pretrain'}, {results['steps']} steps")


def print_accuracy(results: dict[str, Any], console: Console) -> None:
    if results["knn20"] is None:
        console.info("No accuracy was measured: that takes labelled training images, and --val or eval.val_fraction.")
        return
    rows = [
        [name, results[key]]
        for name, key in (
            ("kNN(20), untrained network", "untrained_knn20"),
            ("kNN(20)", "knn20"),
            ("kNN(200)", "knn200"),
            ("linear probe", "probe_top1"),
        )
        if results[key] is not None
    ]
    console.print_table(["held-out accuracy", ""], rows)
