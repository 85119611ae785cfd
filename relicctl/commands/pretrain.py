"""``relicctl pretrain``: from a folder of images to an encoder."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from relicctl import __version__
from relicctl.commands.bad_pool import BadPool
from relicctl.commands.common import pick_device, readable, worker_count
from relicctl.commands.data import PretrainData, open_data
from relicctl.commands.masking import note_missing_masks, open_masking, refuse_other_masks, with_bank_named
from relicctl.commands.options import PretrainOptions
from relicctl.commands.processes import newest_checkpoint
from relicctl.commands.resuming import continued, facts_of, run_to_resume
from relicctl.config.resolve import Resolved, dump_yaml
from relicctl.config.schema import Config
from relicctl.console import Console
from relicctl.core import checkpoint
from relicctl.core.distributed import World, join, leave
from relicctl.core.loop import Plan, Progress, restore, train
from relicctl.curves import draw_curves
from relicctl.data.augment import MEAN, STD, Photometric
from relicctl.data.bad_images import BadImages
from relicctl.data.feed import Feed, ViewPlan, ViewSize, choose_cache
from relicctl.data.sampler import Sampler
from relicctl.data.sources import Source
from relicctl.encoder import load_encoder, save_encoder
from relicctl.errors import DataError, UsageError
from relicctl.evaluation.collapse import CollapseWatch
from relicctl.evaluation.during import Evaluator
from relicctl.memory import check_memory, check_step_memory
from relicctl.pretraining import Pretraining, build_networks, settle_precision
from relicctl.runs import RunFolder, free_name, refuse_occupied


def pretrain(resolved: Resolved, options: PretrainOptions) -> dict[str, Any]:
    """Run or resume a pretraining; returns ``run`` (its folder) and the figures of results.json."""
    resumed = run_to_resume(options, resolved.preset) if options.resume is not None else None
    if resumed is not None:
        resolved = continued(resolved, resumed)
    elif options.out is not None:
        refuse_occupied(options.out, overwrite=options.overwrite)
    config = resolved.config
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    device = pick_device(config.runtime.device)
    world = join(device.type)
    with ExitStack() as at_end:
        at_end.callback(leave)
        if device.type == "cuda":
            device = torch.device("cuda", world.local_rank)
            torch.cuda.set_device(device)
        return _run(resolved, options, resumed, Console(options.quiet or not world.is_main), device, world, at_end)


def _run(
    resolved: Resolved,
    options: PretrainOptions,
    resumed: Path | None,
    console: Console,
    device: torch.device,
    world: World,
    at_end: ExitStack,
) -> dict[str, Any]:
    config = resolved.config
    data = open_data(config, options.download, console)
    sampler = Sampler(config.seed, len(data.train), config.optim.batch_size)
    scheduled = sampler.steps_per_epoch * config.optim.epochs
    refuse_uneven(config, world)
    refuse_differences(data.train, world)
    resolved = with_bank_named(resolved)  # memory may be taken until then by what makes the bank
    config = resolved.config
    check_memory(config, device, world.size)
    out = resumed or options.out or free_name(Path("runs"), resolved.preset or "pretrain")
    refuse_inside(out, config.data.train)
    bad = BadImages(len(data.train), config.data.max_bad)
    evaluator = make_evaluator(config, data, device, bad, console)
    note_missing_masks(resolved, console)
    masking, masks = open_masking(config, data.train, console)
    if resumed:
        record = continued_record(out, resolved, data, masks, device)
    else:
        record = new_record(resolved, options, data, masks, device)
    with torch.device("meta"):
        outline = build_networks(config, len(data.train.classes))
    check_step_memory(config, outline, device, record["precision"], world.size, console)
    task = Pretraining(
        config,
        classes=len(data.train.classes),
        steps_per_epoch=sampler.steps_per_epoch,
        total_steps=scheduled,
        device=device,
        precision=record["precision"],
        world=world,
    )
    if resumed is None:
        start_from(record["init_from"], task)

    run = open_run(out, config, resumed is not None, options.overwrite, world)
    run.write_text(run.config, dump_yaml(config) + yaml.safe_dump({"run": record}, sort_keys=False))
    status = at_end.enter_context(run.watched())
    plan = Plan(
        total=min(scheduled, config.optim.max_steps or scheduled),
        steps_per_epoch=sampler.steps_per_epoch,
        batch_size=config.optim.batch_size,
        log_every=config.runtime.log_every,
        evaluate_every=config.eval.every_epochs * sampler.steps_per_epoch,
        checkpoint_every=config.checkpoint.every_steps,
        checkpoint_minutes=config.checkpoint.every_minutes,
        resume_command=f"relicctl pretrain --resume {shlex.quote(str(run.path))}",
    )
    status.expect(total=plan.total, steps_per_epoch=plan.steps_per_epoch, resume=plan.resume_command)
    pool = BadPool(bad, run, world)
    pool.recall(data.train)
    if evaluator is not None:
        evaluator.bad_held_out.report = run.add_bad_image
    try:
        feed = Feed(
            data.train,
            sampler,
            view_plan(config),
            seed=config.seed,
            device=device,
            world=world,
            cache=record["cache"],
            strict_cache=config.data.cache == "device",
            workers=worker_count(config.runtime, device, record["cache"]),
            bad=bad,
            masking=masking,
        )
    except UsageError:
        if resumed is None:
            run.discard()
        raise
    evaluate = None
    if evaluator is not None:
        evaluate = status.during("evaluating", lambda step: evaluator(task.encoder, world))

    progress = go_on(run, task, record["init_from"], console, world) if resumed is not None else None
    if progress is None:
        progress = begin(evaluate, run, console)
    with console.progress(plan.total, progress.step) as bar:
        watch = CollapseWatch(console.warn, config.optim.batch_size, task.candidates)

        def show(step: int, figures: dict[str, Any]) -> None:
            bar.update(step, readable(figures))
            watch(step, figures)
            pool.share()

        progress = train(
            task,
            status.beating(feed),
            plan,
            run,
            progress=progress,
            device=device,
            world=world,
            evaluate=evaluate,
            show=show,
        )
    results = {
        "objective": config.objective,
        "steps": progress.step,
        "epochs": round(progress.step / sampler.steps_per_epoch, 4),
        **{key: progress.facts.get(key) for key in ("untrained_knn20", "knn20", "knn200", "probe_top1")},
        "protocol": evaluator.protocol if evaluator else None,
        "images": len(data.train),
        "bad_images": len(bad.seen),
        "bad_val_images": len(evaluator.bad_held_out.seen) if evaluator else 0,
        "bgmask": masks,
        "preset": resolved.preset,
        "version": __version__,
    }
    if world.is_main:
        finish(run, task, config, resolved.preset, results)
        report(results, console)
    return {"run": str(run.path), **results}


# The steps of the recipe.


def make_evaluator(
    config: Config, data: PretrainData, device: torch.device, bad: BadImages, console: Console
) -> Evaluator | None:
    if not config.eval.every_epochs or data.held_out is None:
        return None
    if data.train.labels is None:
        console.note("The training images have no labels: no kNN accuracy during this run, whatever --val has.")
        return None
    size = config.eval.size or config.views.large.size
    return Evaluator(data.train, data.held_out, config.eval, size, config.seed, device, bad)


def refuse_inside(out: Path, data: str | None) -> None:
    """A run's pictures must not become training images of its continuation."""
    folder = Path((data or "").partition("#")[0])
    if data and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"The run folder {out} lies inside the data, {folder}.", "Choose another --out.")


def refuse_uneven(config: Config, world: World) -> None:
    """Raises UsageError if the batch cannot be split over the processes, or a process's share into microbatches."""
    first, last = world.rows(config.optim.batch_size)
    microbatch = config.optim.microbatch
    if microbatch is not None and (last - first) % microbatch:
        raise UsageError(
            f"optim.microbatch {microbatch} does not divide the {last - first} images of a process.",
            "Choose one that does, or another number of processes.",
        )


def refuse_differences(images: Source, world: World) -> None:
    """Raises DataError if the processes see different images under the same numbers."""
    if world.size > 1 and len(set(world.tell(images.fingerprint()))) > 1:
        raise DataError(
            f"The processes see different images at {images.spec}.", "Give all hosts the same data at this path."
        )


def new_record(
    resolved: Resolved, options: PretrainOptions, data: PretrainData, masks: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """What config.yaml says under ``run``: facts that a continuation must share."""
    return {
        "version": __version__,
        "preset": resolved.preset,
        "data_fingerprint": data.train.fingerprint(),
        "images": len(data.train),
        "bgmask_sha256": masks.get("sha256"),
        "init_from": options.init_from,
        "cache": choose_cache(resolved.config.data.cache, data.train, device, masks["masked_views"] > 0),
        "precision": settle_precision(resolved.config, device),
    }


def continued_record(
    run: Path, resolved: Resolved, data: PretrainData, masks: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """The facts noted at the start; the precision may be chosen anew. Raises DataError for other images or masks."""
    record = facts_of(run)
    if record["data_fingerprint"] != data.train.fingerprint():
        raise DataError(
            f"The images are not those that {run} was started with.",
            "Give --data the same images, or start another run with --init-from.",
        )
    refuse_other_masks(run, record, masks)
    if resolved.origin["runtime.precision"] != "run":
        record["precision"] = settle_precision(resolved.config, device)
    return record


def open_run(out: Path, config: Config, resumed: bool, overwrite: bool, world: World) -> RunFolder:
    if resumed:
        run = RunFolder.reopen(out, keep=config.checkpoint.keep, writer=world.is_main)
    else:
        run = RunFolder.create(out, overwrite=overwrite, keep=config.checkpoint.keep, writer=world.is_main)
    if config.runtime.tensorboard:
        run.write_tensorboard()
    return run


def start_from(weights: str | None, task: Pretraining) -> None:
    """Put an encoder's weights into both networks. Raises UsageError if they do not fit."""
    if weights is None:
        return
    start, own = load_encoder(weights).state_dict(), task.encoder.state_dict()
    if {name: t.shape for name, t in start.items()} != {name: t.shape for name, t in own.items()}:
        raise UsageError(
            f"The weights of {weights} do not fit this encoder.",
            "Set model.arch, model.width and model.stem to theirs.",
        )
    for network in (task.state.online, task.state.target):
        if network is not None:
            network["encoder"].load_state_dict(start)


def begin(evaluate: Any, run: RunFolder, console: Console) -> Progress:
    """Step 0: what the network is worth before training."""
    progress = Progress()
    if evaluate is not None:
        figures = evaluate(0)
        progress.facts = {f"untrained_{name}": value for name, value in figures.items()}
        if figures:
            run.metrics({"step": 0, "epoch": 0.0, **figures})
            console.note(f"untrained: kNN(20) {figures['knn20']:.3f}")
    return progress


def go_on(run: RunFolder, task: Pretraining, init_from: str | None, console: Console, world: World) -> Progress | None:
    """Load the newest checkpoint that the main process can read; None for a run that ended before its first one."""
    found = newest_checkpoint(run, world, console.warn)
    if found is None:
        if checkpoint.listed(run.checkpoints):
            raise UsageError(f"No checkpoint in {run.checkpoints} can be read.", "Start another run.")
        console.note(f"{run.path} has no checkpoint yet: starting at step 0")
        run.rewind_metrics(-1)
        start_from(init_from, task)
        return None
    path, tensors, header = found
    progress = restore(task, tensors, header, str(path))
    run.set_aside(progress.step)
    run.rewind_metrics(progress.step)
    console.note(f"resumed from {path} at step {progress.step}")
    return progress


def finish(run: RunFolder, task: Pretraining, config: Config, preset: str | None, results: dict[str, Any]) -> None:
    metadata = {
        "version": __version__,
        "preset": preset or "",
        "objective": config.objective,
        "network": "online",
        "size": str(config.eval.size or config.views.large.size),
        "crop_ratio": str(config.eval.crop_ratio),
        "mean": str(list(MEAN)),
        "std": str(list(STD)),
    }
    save_encoder(run.encoder, task.encoder, metadata)
    run.write_json(run.results, results)
    draw_curves(run.read_metrics(), run.curves, f"{preset or 'pretrain'}, {results['steps']} steps")


def report(results: dict[str, Any], console: Console) -> None:
    if results["knn20"] is None:
        console.note("No accuracy was measured: that takes labelled training images, and --val or eval.holdout.")
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
    console.table(["held-out accuracy", ""], rows)


# Small decisions.


def view_plan(config: Config) -> ViewPlan:
    views = config.views
    sizes = [ViewSize(views.large.count, views.large.size, views.large.area)]
    if views.small.count:
        sizes.append(ViewSize(views.small.count, views.small.size, views.small.area))
    return ViewPlan(tuple(sizes), views.aspect, Photometric(**views.photometric.model_dump()))
