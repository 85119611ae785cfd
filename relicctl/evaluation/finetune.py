"""Fine-tuning on another data set: every combination of hyperparameters, the best on validation trained again."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from relicctl.config.transfer import TransferConfig
from relicctl.core.atomic_io import write_atomically
from relicctl.core.counter_rng import Stream, derive_seed, fork_seeded_rng
from relicctl.core.loop import LoopConfig, Task
from relicctl.core.optim import compute_learning_rate
from relicctl.data.loader import resolve_cache
from relicctl.data.sampler import Sampler
from relicctl.data.views import Batch
from relicctl.errors import Diverged
from relicctl.evaluation.cells import open_subfolder
from relicctl.evaluation.features import EvalImages, FeatureExtractor, extract_features
from relicctl.evaluation.metrics import ProtocolResult, compute_metric, find_best_candidate
from relicctl.evaluation.transfer_data import Split, TransferDataset
from relicctl.models.layers import convert_sync_batchnorm
from relicctl.runs.distributed import RunContext
from relicctl.runs.training import resume_and_train

HyperParams = dict[str, float]  # rate, decay and perhaps epochs; without these a training takes finetune.steps


@dataclass(frozen=True)
class GridSearch:
    """Fine-tunes one encoder on one data set, all ranks together. Trainings leave checkpoints in ``folder``."""

    extractor: FeatureExtractor
    config: TransferConfig
    folder: Path
    data: TransferDataset
    metric: str

    def __call__(self, split: Split) -> ProtocolResult:
        finetune, console = self.config.finetune, self.extractor.context.console
        axes: dict[str, tuple[float, ...]] = {"rate": finetune.lrs, "decay": finetune.weight_decays}
        if finetune.epochs:
            axes["epochs"] = finetune.epochs
        grid: list[HyperParams] = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
        candidates, warnings = [], []
        for number, hyper in enumerate(grid, 1):
            console.info(f"fine-tuning {number} of {len(grid)}: {_format_params(hyper)}")
            folder_name = "-".join(f"{value:g}" for value in hyper.values())
            value = self._evaluate_candidate(folder_name, hyper, split.train, split.val)
            if value is None:
                warnings.append(f"{_format_params(hyper)} diverged and was left out")
            else:
                candidates.append(hyper | {"value": value})
        if not candidates:
            raise Diverged("Every fine-tuning diverged.", "Resume with lower rates: --set finetune.lrs=[...].")
        best = {name: value for name, value in find_best_candidate(candidates).items() if name != "value"}
        console.info(f"fine-tuning with the best, {_format_params(best)}, on training and validation images")
        value = self._evaluate_candidate("final", best, np.concatenate([split.train, split.val]), None)
        assert value is not None, "the final training raises Diverged"
        if len(finetune.lrs) > 2 and best["rate"] in (min(finetune.lrs), max(finetune.lrs)):
            warnings.append(f"the best rate, {best['rate']:g}, is at the end of those tried: add to finetune.lrs")
        return ProtocolResult(value, best, candidates, warnings)

    def _evaluate_candidate(
        self, name: str, hyper: HyperParams, train_rows: np.ndarray, val_rows: np.ndarray | None
    ) -> float | None:
        """Return the metric on ``val_rows`` of trainval (None: on the test images) after a training on ``train_rows``.

        Returns None if a training that is evaluated on ``val_rows`` diverged.
        """
        value_file, world = self.folder / name / "value.json", self.extractor.context.world

        def save(value: float | None) -> float | None:
            write_atomically(value_file, lambda temporary: temporary.write_text(json.dumps(value), "utf-8"))
            shutil.rmtree(value_file.parent / "checkpoints", ignore_errors=True)  # a large grid would fill the disk
            return value

        finished: list[float | None] = world.broadcast_from_main(
            lambda: [json.loads(value_file.read_text("utf-8"))] if value_file.is_file() else []
        )
        if finished:
            return finished[0]
        try:
            network = self._train(self.folder / name, hyper, np.sort(train_rows))
        except Diverged:
            if val_rows is None:
                raise
            return world.broadcast_from_main(lambda: save(None))
        value = self._score(network, val_rows)
        return world.broadcast_from_main(lambda: save(value))

    def _score(self, network: nn.Module, val_rows: np.ndarray | None) -> float:
        images = self.data.test if val_rows is None else self.data.trainval
        rows = np.arange(len(images.labels)) if val_rows is None else val_rows
        crops = EvalImages(images.source.select(rows), self.extractor.size, self.extractor.crop_ratio)
        context = self.extractor.context
        scores = extract_features(network, crops, context.device, context.world)
        decoded = np.array([row for row in range(len(crops)) if row not in crops.bad])
        return compute_metric(self.metric, scores.cpu()[decoded], torch.from_numpy(images.labels[rows][decoded]))

    def _train(self, folder: Path, hyper: HyperParams, rows: np.ndarray) -> nn.Module:
        config, finetune, context = self.config, self.config.finetune, self.extractor.context
        source = self.data.trainval.source.select(rows)
        sampler = Sampler(config.seed, len(rows), min(finetune.batch_size, len(rows)))
        steps = int(hyper["epochs"]) * sampler.steps_per_epoch if "epochs" in hyper else finetune.steps
        params = FinetuneParams(
            hyper["rate"], hyper["decay"], finetune.momentum, steps, sampler.steps_per_epoch, self.metric == "map11",
            config.seed,
        )  # fmt: skip
        task = FinetuneTask(self.extractor.encoder, len(self.data.trainval.classes), params, context)
        cache = context.world.broadcast_from_main(lambda: resolve_cache(config.data.cache, source, context.device))
        loader = self.extractor.build_crop_loader(source, sampler, finetune, cache)
        loop_config = LoopConfig.from_sections(
            config.checkpoint, config.runtime, total=steps, steps_per_epoch=sampler.steps_per_epoch,
            batch_size=sampler.batch_size, resume_command=f"relicctl transfer {context.run.resume_option}",
            lr_key="finetune.lrs",
        )  # fmt: skip
        with open_subfolder(context, folder, config.checkpoint.keep) as subfolder:
            resume_and_train(task, loader, loop_config, subfolder)
        return task.model.eval()


def _format_params(hyper: HyperParams) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in hyper.items())


@dataclass(frozen=True)
class FinetuneParams:
    """One training: ``lr`` falls along a cosine to 0 over ``steps``; ``weight_decay`` is on all parameters.

    ``one_vs_rest``: each class has its own sigmoid.
    """

    lr: float
    weight_decay: float
    momentum: float
    steps: int
    steps_per_epoch: int
    one_vs_rest: bool
    seed: int


class FinetuneTask(Task):
    """The loop's task: trains a copy of ``encoder`` with a linear layer on top.

    Each rank has its rows of the global batch; BatchNorm and gradients are taken over all of them.
    """

    def __init__(self, encoder: Any, classes: int, params: FinetuneParams, context: RunContext) -> None:
        device, split = context.device, context.world.size > 1
        self._params, self._classes = params, classes
        with fork_seeded_rng(derive_seed(params.seed, Stream.INIT)):
            head = nn.Linear(encoder.feature_dim, classes)
        network = nn.Sequential(copy.deepcopy(encoder).requires_grad_(True), head)
        if split:
            network = convert_sync_batchnorm(network, device)
        self.model: nn.Module = network.to(device).to(memory_format=torch.channels_last).train()
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = compute_bn_momentum(params.steps_per_epoch)
        self.optimizer = torch.optim.SGD(
            network.parameters(), params.lr, params.momentum, weight_decay=params.weight_decay, nesterov=True,
            foreach=True,
        )  # fmt: skip
        self._network: nn.Module = DistributedDataParallel(self.model) if split else self.model
        self._autocast = context.autocast()

    def compute_loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return the cross-entropy of a softmax, or of one sigmoid for each class (``one_vs_rest``).

        Labels int8 ``[B, C]`` are 1 and -1, and 0 where an image is ignored for a class: it adds 0 to the mean.
        """
        assert batch.labels is not None
        with self._autocast:
            logits = self._network(batch.views[0][0])
        if self._params.one_vs_rest:
            multi_label = batch.labels.ndim == 2
            truth = batch.labels if multi_label else one_hot(batch.labels, self._classes)
            valid = (truth != 0).float() if multi_label else None
            return {"loss": binary_cross_entropy_with_logits(logits.float(), (truth > 0).float(), valid)}
        return {"loss": cross_entropy(logits.float(), batch.labels)}

    def get_learning_rate(self, step: int) -> float:
        return compute_learning_rate(step, peak=self._params.lr, warmup_steps=0, total_steps=self._params.steps)


def compute_bn_momentum(steps_per_epoch: int) -> float:
    """Return torch's momentum of running statistics, which is 1 - decay; BYOL's decay is max(1 - 10 / s, 0.9)."""
    return 1 - max(1 - 10 / steps_per_epoch, 0.9)
