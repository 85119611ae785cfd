"""The run folder of a pretraining: what is recorded at the start, how it is resumed, what is written at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from relicctl.config.pretrain import PretrainConfig
from relicctl.config.resolve import ResolvedConfig, dump_yaml
from relicctl.core import checkpoint
from relicctl.core.loop import TrainState, restore_state
from relicctl.data.loader import resolve_cache
from relicctl.encoders.file import describe_transform, save_encoder
from relicctl.errors import DataError, UsageError
from relicctl.pretraining.data import PretrainData
from relicctl.pretraining.task import PretrainTask, load_initial_weights, resolve_precision
from relicctl.runs.distributed import RunContext, load_newest_checkpoint
from relicctl.runs.folder import RunFolder
from relicctl.runs.plots import plot_curves
from relicctl.runs.resume import make_record, read_resumable_record
from relicctl.version import __version__


def open_record(
    resumed: Path | None,
    resolved: ResolvedConfig,
    init_from: str | None,
    data: PretrainData,
    masks: dict[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """Return the facts recorded when the run started, of which only the precision may be chosen anew, or a new run's.

    Raises DataError for other images or masks than those of the run ``resumed``.
    """
    if resumed is None:
        cache = resolve_cache(resolved.config.data.cache, data.train, device, masks["masked_views"] > 0)
        facts = {"bgmask_sha256": masks.get("sha256"), "init_from": init_from, "cache": cache}
        return make_record(resolved, data.train, **facts, precision=resolve_precision(resolved.config, device))
    fix = "Give --data the same images, or start a new run with --init-from."
    record = read_resumable_record(resumed, data.train, fix)
    if record.get("bgmask_sha256") != masks.get("sha256"):
        what = f"The mask bank {masks['bank']} is not the one that {resumed} was started with."
        raise DataError(what, "Give --bgmask that bank, or start a new run with --init-from.")
    if resolved.origin["runtime.precision"] != "run":
        record["precision"] = resolve_precision(resolved.config, device)
    return record


def write_config(run: RunFolder, config: PretrainConfig, record: dict[str, Any]) -> None:
    """Write config.yaml, and from now on metrics for TensorBoard if the config asks for them."""
    if config.runtime.tensorboard:
        run.start_tensorboard()
    run.write_text(run.config_path, dump_yaml(config) + yaml.safe_dump({"run": record}, sort_keys=False))


def resume_training(task: PretrainTask, init_from: str | None, context: RunContext) -> TrainState | None:
    """Load the newest checkpoint that the main rank can read; None for a run that ended before its first one.

    Raises UsageError where there are checkpoints, but none can be read.
    """
    run, console = context.run, context.console
    loaded = load_newest_checkpoint(run, context.world, console.warn)
    if loaded is None:
        if checkpoint.list_checkpoints(run.checkpoints_dir):
            raise UsageError(f"No checkpoint in {run.checkpoints_dir} can be read.", "Start another run.")
        console.info(f"{run.path} has no checkpoint yet: starting at step 0")
        run.truncate_metrics(-1)
        load_initial_weights(init_from, task, console.warn)
        return None
    path, tensors, header = loaded
    state = restore_state(task, tensors, header, str(path))
    run.quarantine_after(state.step)
    run.truncate_metrics(state.step)
    console.info(f"resumed from {path} at step {state.step}")
    return state


def save_results(run: RunFolder, task: PretrainTask, config: PretrainConfig, results: dict[str, Any]) -> None:
    """Write the encoder, results.json and the curves."""
    preset = results["preset"]
    metadata = {
        "version": __version__,
        "preset": preset or "",
        "objective": config.objective,
        "network": "online",
        **describe_transform(
            config.eval.size or config.views.large.size, config.eval.crop_pct, config.data.decoding.white_point
        ),
    }
    save_encoder(run.encoder_path, task.encoder, metadata)
    run.write_json(run.results_path, results)
    plot_curves(run.read_metrics(), run.curves_path, f"{preset or 'pretrain'}, {results['steps']} steps")
