"""``relicctl pretrain``: from a folder of images to an encoder.

Read this file first: ``prepare`` opens the data and checks everything, ``build`` makes networks, loader and loop,
``train`` runs them and ``finish`` writes the results. Each names the module that does the work.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relicctl.config.base import list_specs
from relicctl.config.pretrain import PretrainConfig
from relicctl.config.resolve import ResolvedConfig
from relicctl.console import Console
from relicctl.core.loop import Batches, LoopConfig, TrainState
from relicctl.data.background_removal import BackgroundRemoval
from relicctl.data.decoding import BadImages
from relicctl.data.loader import LoaderConfig, ViewLoader
from relicctl.data.sampler import Sampler
from relicctl.errors import UsageError
from relicctl.evaluation.online import CollapseMonitor, OnlineEvaluator
from relicctl.pretraining.data import (
    PretrainData,
    build_evaluator,
    build_view_plan,
    check_batch_split,
    check_same_images,
    log_missing_masks,
    open_masking,
    open_pretrain_data,
    resolve_bank_path,
)
from relicctl.pretraining.estimate import check_step_memory, check_view_memory
from relicctl.pretraining.run import open_record, resume_training, save_results, write_config
from relicctl.pretraining.task import PretrainTask, Schedule, load_initial_weights
from relicctl.runs.distributed import (
    RunContext,
    Session,
    SharedBadImages,
    open_distributed_session,
    open_or_create_run_folder,
    resolve_num_workers,
)
from relicctl.runs.folder import check_outside_data, check_overwrite, find_free_name
from relicctl.runs.resume import TrainingOptions, resolve_run
from relicctl.runs.status import HeartbeatBatches
from relicctl.runs.training import log_start, train_with_progress, warn_of_late_end
from relicctl.version import __version__

ACCURACIES = {
    "untrained_knn20": "kNN(20), untrained network",
    "knn20": "kNN(20)",
    "knn200": "kNN(200)",
    "probe_top1": "linear probe",
}


@dataclass(frozen=True)
class Prepared:
    """What a run needs, opened and checked before anything is built or written."""

    resolved: ResolvedConfig
    out: Path
    resumed: bool
    record: dict[str, Any]  # what config.yaml stores under ``run``
    data: PretrainData
    sampler: Sampler
    schedule: Schedule
    evaluator: OnlineEvaluator | None
    masking: BackgroundRemoval | None
    mask_info: dict[str, Any]  # what results.json stores under ``bgmask``
    bad_images: BadImages

    @property
    def config(self) -> PretrainConfig:
        config: PretrainConfig = self.resolved.config
        return config


@dataclass(frozen=True)
class Training:
    """What runs: the task on its batches, and what is done beside it."""

    loader: Batches
    loop: LoopConfig
    evaluate: Callable[[int], dict[str, Any]] | None
    bad_images: SharedBadImages


def pretrain(resolved: ResolvedConfig, options: TrainingOptions) -> dict[str, Any]:
    """Run or resume a pretraining; return ``run`` (its folder) and the contents of results.json."""
    resolved, resumed = resolve_run(resolved, options)
    if resumed is None and options.out is not None:
        check_overwrite(options.out, overwrite=options.overwrite)
    with open_distributed_session(resolved.config.runtime, options.quiet) as session:
        prepared = prepare(resolved, options, resumed, session)
        task = build_task(prepared, session)
        run = open_or_create_run_folder(
            session.world, prepared.out, resumed=prepared.resumed, overwrite=options.overwrite,
            keep=prepared.config.checkpoint.keep,
        )  # fmt: skip
        write_config(run, prepared.config, prepared.record)
        with run.track_status():
            context = session.with_run(run, prepared.record["precision"])
            training = build_training(prepared, task, context)
            log_start(resolved, options, context, images=len(prepared.data.train), steps=training.loop.total)
            state = train(prepared, task, training, context)
            return finish(prepared, task, state, context)


def prepare(resolved: ResolvedConfig, options: TrainingOptions, resumed: Path | None, session: Session) -> Prepared:
    """Open images and masks, and check all that can be wrong before networks are built or a folder is written."""
    config, device, world, console = resolved.config, session.device, session.world, session.console
    data = open_pretrain_data(config, options.download, console)
    classes = len(data.train.classes)
    sampler = Sampler(config.seed, len(data.train), config.optim.batch_size)
    check_batch_split(config, world)
    check_same_images(data.train, world)
    out = resumed or options.out or find_free_name(Path("runs"), resolved.preset or "pretrain")
    if resumed is None:
        check_outside_data(out, (*list_specs(config.data.train), *list_specs(config.data.val)))
    resolved = resolve_bank_path(resolved)  # may wait for train-bgmask to end, which takes memory until then
    config = resolved.config
    check_view_memory(config, device, world.size)
    bad_images = BadImages(len(data.train), config.data.max_corrupt_fraction)
    evaluator = build_evaluator(config, data, device, bad_images, console)
    log_missing_masks(resolved, console)
    masking, mask_info = open_masking(config, data.train, console)
    record = open_record(resumed, resolved, options.init_from, data, mask_info, device)
    check_step_memory(config, classes, device, record["precision"], world.size, console)
    schedule = Schedule(config, sampler.steps_per_epoch)
    warn_of_late_end(config.optim.max_steps, schedule.total_steps, console)
    return Prepared(
        resolved=resolved, out=out, resumed=resumed is not None, record=record, data=data, sampler=sampler,
        schedule=schedule, evaluator=evaluator, masking=masking,
        mask_info=mask_info, bad_images=bad_images,
    )  # fmt: skip


def build_task(prepared: Prepared, session: Session) -> PretrainTask:
    """Build networks, objective and optimiser; a new run may start from the weights of --init-from."""
    task = PretrainTask(
        prepared.config, prepared.schedule, classes=len(prepared.data.train.classes), device=session.device,
        precision=prepared.record["precision"], world=session.world,
    )  # fmt: skip
    if not prepared.resumed:
        load_initial_weights(prepared.record["init_from"], task, session.console.warn)
    return task


def build_training(prepared: Prepared, task: PretrainTask, context: RunContext) -> Training:
    """Build the loader of views, the settings of the loop and the evaluation that runs every few epochs."""
    config, schedule, run, world = prepared.config, prepared.schedule, context.run, context.world
    loop = LoopConfig.from_sections(
        config.checkpoint, config.runtime, total=schedule.last_step, steps_per_epoch=schedule.steps_per_epoch,
        batch_size=config.optim.batch_size, evaluate_every=config.eval.every_epochs * schedule.steps_per_epoch,
        resume_command=f"relicctl pretrain --resume {shlex.quote(str(run.path))}",
    )  # fmt: skip
    run.status.set_total(total=loop.total, steps_per_epoch=loop.steps_per_epoch, resume=loop.resume_command)
    bad_images = SharedBadImages(prepared.bad_images, run, world)
    bad_images.load_recorded(prepared.data.train)
    evaluate = None
    if (evaluator := prepared.evaluator) is not None:
        evaluator.bad_held_out.report, evaluator.bad_held_out.listed_in = run.add_bad_image, str(run.bad_images_path)
        evaluate = run.status.wrap_in_state("evaluating", lambda step: evaluator(task.encoder, world))
    try:
        loader = build_loader(prepared, context)
    except UsageError:  # data.cache=device with images that it cannot hold
        if not prepared.resumed:
            run.delete()
        raise
    return Training(HeartbeatBatches(loader, run.status), loop, evaluate, bad_images)


def build_loader(prepared: Prepared, context: RunContext) -> ViewLoader:
    config, cache = prepared.config, prepared.record["cache"]
    workers, strict = resolve_num_workers(config.runtime, context.device, cache), config.data.cache == "device"
    loading = LoaderConfig(config.seed, context.device, context.world, cache, strict_cache=strict, workers=workers)
    plan = build_view_plan(config)
    return ViewLoader(prepared.data.train, prepared.sampler, plan, loading, prepared.bad_images, prepared.masking)


def train(prepared: Prepared, task: PretrainTask, training: Training, context: RunContext) -> TrainState:
    """Train to the end: from the newest checkpoint of a resumed run, else from step 0, evaluated untrained first."""
    state = resume_training(task, prepared.record["init_from"], context) if prepared.resumed else None
    if state is None:
        state = evaluate_untrained(training, context)
    collapse_monitor = CollapseMonitor(context.console.warn, prepared.config.optim.batch_size, task.num_candidates)

    def check_log_line(step: int, metrics: dict[str, Any]) -> None:
        collapse_monitor(step, metrics)
        training.bad_images.sync()

    loader, loop, evaluate = training.loader, training.loop, training.evaluate
    return train_with_progress(task, loader, loop, context, state, evaluate=evaluate, on_log=check_log_line)


def evaluate_untrained(training: Training, context: RunContext) -> TrainState:
    """Return the state at step 0, with the metrics of the network before any training."""
    state = TrainState()
    metrics = training.evaluate(0) if training.evaluate is not None else {}
    if metrics:
        state.eval_metrics = {f"untrained_{name}": value for name, value in metrics.items()}
        context.run.write_metrics({"step": 0, "epoch": 0.0, **metrics})
        context.console.info(f"untrained: kNN(20) {metrics['knn20']:.3f}")
    return state


def finish(prepared: Prepared, task: PretrainTask, state: TrainState, context: RunContext) -> dict[str, Any]:
    """Write the encoder, results.json and the curves, and print the accuracy."""
    config, evaluator = prepared.config, prepared.evaluator
    results = {
        "objective": config.objective,
        "steps": state.step,
        "epochs": round(state.step / prepared.schedule.steps_per_epoch, 4),
        **{key: state.eval_metrics.get(key) for key in ACCURACIES},
        "protocol": evaluator.protocol if evaluator else None,
        "images": len(prepared.data.train),
        "bad_images": len(prepared.bad_images.seen),
        "bad_val_images": len(evaluator.bad_held_out.seen) if evaluator else 0,
        "bgmask": prepared.mask_info,
        "preset": prepared.resolved.preset,
        "version": __version__,
    }
    if context.world.is_main:
        save_results(context.run, task, config, results)
        print_accuracy(results, context.console)
    return {"run": str(context.run.path), **results}


def print_accuracy(results: dict[str, Any], console: Console) -> None:
    if results["knn20"] is None:
        console.info("Accuracy needs labelled training images and --val or eval.val_fraction.")
        return
    rows = [[title, results[key]] for key, title in ACCURACIES.items() if results[key] is not None]
    console.print_table(["held-out accuracy", ""], rows)
