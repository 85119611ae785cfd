"""Ratios that must not rot: the host against PIL, the monitor and the evaluations against the steps between them.

On the demo's own data and networks, where steps are short and so the rest weighs most.
"""

from __future__ import annotations

import json
import os
import statistics

import torch
from turns import our_host, photos, pil_pipeline, ratio, take_turns

from relicctl.benchmark.train_step import measure_step_parts
from relicctl.config.resolve import resolve_config
from relicctl.console import Console
from relicctl.core.hardware import pick_precision
from relicctl.data.decoding import BadImages
from relicctl.data.loader import LoaderConfig, ViewLoader, resolve_cache
from relicctl.data.sampler import Sampler
from relicctl.pretraining.data import build_evaluator, build_view_plan, open_pretrain_data
from relicctl.pretraining.task import PretrainTask, Schedule


def main() -> None:
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    source = photos()
    host = take_turns({"PIL": pil_pipeline(source), "ours": our_host(source)})

    config = resolve_config("demo").config
    data = open_pretrain_data(config, False, Console(quiet=True))
    sampler = Sampler(config.seed, len(data.train), config.optim.batch_size)
    cache = resolve_cache(config.data.cache, data.train, cpu)
    bad = BadImages(len(data.train), config.data.max_corrupt_fraction)
    feed = ViewLoader(
        data.train, sampler, build_view_plan(config), LoaderConfig(config.seed, cpu, cache=cache), bad
    )  # fmt: skip
    task = PretrainTask(
        config, Schedule(config, sampler.steps_per_epoch, 1000), classes=0, device=cpu,
        precision=pick_precision(config.runtime.precision, cpu),
    )  # fmt: skip
    parts = measure_step_parts(task, feed, 20, config.runtime.log_every, cpu)
    step = [sum(seconds) for seconds in zip(*parts.values(), strict=True)]
    usual = statistics.median(step)
    between = usual * sampler.steps_per_epoch * config.eval.every_epochs
    evaluator = build_evaluator(config, data, cpu, bad, Console(quiet=True))
    assert evaluator is not None
    evaluations = take_turns({"kNN and probe": lambda: evaluator(task.encoder)}, runs=3)["kNN and probe"]
    outside = {name: statistics.median(taken) / usual for name, taken in parts.items() if "networks" not in name}
    result = {
        "load": os.getloadavg()[0],
        "host: PIL to ours": ratio(host["PIL"], host["ours"]),
        "monitor and log line, share of a step": round(statistics.median(parts["logging"]) / usual, 5),
        "evaluation, share of the steps between two": round(statistics.median(evaluations) / between, 4),
        "outside the networks, share of a step": {name: round(share, 4) for name, share in outside.items()},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
