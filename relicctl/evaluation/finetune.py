"""``relicctl transfer --protocol finetune``: every rate, decay and length, chosen on validation, trained anew."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from relicctl.config.transfer import TransferConfig
from relicctl.console import Console
from relicctl.core import atomic_io
from relicctl.core.counter_rng import Stream, derive_seed, fork_seeded_rng
from relicctl.core.distributed import SINGLE_PROCESS, World
from relicctl.core.hardware import pick_precision
from relicctl.core.loop import LoopConfig, Task, TrainState, restore_state, train
from relicctl.core.optim import compute_learning_rate
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.loader import LoaderConfig, ViewLoader, resolve_cache
from relicctl.data.photometric import AugmentConfig
from relicctl.data.sampler import Sampler
from relicctl.data.views import Batch, CropSpec, ViewSpec
from relicctl.errors import Diverged
from relicctl.evaluation.features import EvalImages, FeatureExtractor, extract_features
from relicctl.evaluation.labelled_data import LabelledDataset
from relicctl.evaluation.metrics import ProtocolResult, compute_metric, find_best_candidate
from relicctl.evaluation.transfer_data import Split, TransferDataset
from relicctl.models.layers import convert_sync_batchnorm
from relicctl.runs.distributed import load_newest_checkpoint, open_sub_run, resolve_num_workers, select_progress_metrics


@dataclass(frozen=True)
class HyperParams:
    """What is chosen; of no ``epochs`` the training has finetune.steps."""

    rate: float
    decay: float
    epochs: int | None

    @property
    def params(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.params.items())


@dataclass(frozen=True)
class GridSearch:
    """Fine-tunes one encoder, all processes together. Trainings leave checkpoints in ``folder`` to go on from.

    ``run``: the folder of the whole comparison, which is what goes on.
    """

    extractor: FeatureExtractor
    config: TransferConfig
    folder: Path
    run: Path
    console: Console

    def __call__(self, data: TransferDataset, division: Split, metric: str) -> ProtocolResult:
        finetune = self.config.finetune
        grid = [
            HyperParams(*chosen)
            for chosen in itertools.product(finetune.lrs, finetune.weight_decays, finetune.epochs or (None,))
        ]
        tried, warnings = [], []
        for number, hyper in enumerate(grid, 1):
            self.console.info(f"fine-tuning {number} of {len(grid)}: {hyper}")
            name = "-".join(f"{figure:g}" for figure in hyper.params.values())
            value = self._evaluate_candidate(name, data, division.train, hyper, metric, division.val)
            if value is None:
                warnings.append(f"{hyper} diverged and is out of the choice")
            else:
                tried.append(hyper.params | {"value": value})
        if not tried:
            raise Diverged("Every fine-tuning diverged.", "Go on by --resume with --set finetune.lrs=[...] lower.")
        best_trial = find_best_candidate(tried)
        chosen = next(hyper for hyper in grid if hyper.params | {"value": best_trial["value"]} == best_trial)
        self.console.info(f"fine-tuning the best, {chosen}, on all but the test")
        trainval_rows = np.concatenate([division.train, division.val])
        value = self._evaluate_candidate("final", data, trainval_rows, chosen, metric, None)
        assert value is not None, "without a choice a divergence ends it"
        if len(finetune.lrs) > 2 and chosen.rate in (min(finetune.lrs), max(finetune.lrs)):
            warnings.append(f"the best rate, {chosen.rate:g}, is at the end of those tried: add to finetune.lrs")
        return ProtocolResult(value, chosen.params, tried, warnings)

    def _evaluate_candidate(
        self,
        name: str,
        data: TransferDataset,
        rows: np.ndarray,
        hyper: HyperParams,
        metric: str,
        val_rows: np.ndarray | None,
    ) -> float | None:
        """The metric on ``val_rows`` rows of the known images, or on the test images, after a training on ``rows``.

        None where a training that is to be judged on ``val_rows`` rows diverged.
        """
        value_file, world = self.folder / name / "value.json", self.extractor.world
        finished = world.broadcast_from_main(
            lambda: [json.loads(value_file.read_text("utf-8"))] if value_file.is_file() else []
        )
        if finished:
            return finished[0]
        try:
            network = self._train(self.folder / name, data.trainval, np.sort(rows), hyper, metric)
        except Diverged:
            if val_rows is None:
                raise
            return world.broadcast_from_main(lambda: self._save_value(value_file, None))
        known = data.trainval
        source, labels = (
            (data.test.source, data.test.labels)
            if val_rows is None
            else (known.source.select(val_rows), known.labels[val_rows])
        )
        value = self._score(network, source, labels, metric)
        return world.broadcast_from_main(lambda: self._save_value(value_file, value))

    @staticmethod
    def _save_value(done: Path, value: float | None) -> float | None:
        atomic_io.write_atomically(done, lambda temporary: temporary.write_text(json.dumps(value), "utf-8"))
        shutil.rmtree(done.parent / "checkpoints", ignore_errors=True)  # a large grid would fill the disk
        return value

    def _score(self, network: nn.Module, source: ImageDataset, labels: np.ndarray, metric: str) -> float:
        crops = EvalImages(source, self.extractor.size, self.extractor.crop_ratio)
        scores = extract_features(network, crops, self.extractor.device, self.extractor.world)
        rows = np.array([row for row in range(len(crops)) if row not in crops.bad])
        return compute_metric(metric, scores.cpu()[rows], torch.from_numpy(labels[rows]))

    def _train(
        self, path: Path, known: LabelledDataset, rows: np.ndarray, hyper: HyperParams, metric: str
    ) -> nn.Module:
        finetune, runtime = self.config.finetune, self.config.runtime
        device, world = self.extractor.device, self.extractor.world
        source = known.source.select(rows)
        sampler = Sampler(self.config.seed, len(rows), min(finetune.batch_size, len(rows)))
        steps = finetune.steps if hyper.epochs is None else hyper.epochs * sampler.steps_per_epoch
        tuning = FinetuneParams(
            hyper.rate, hyper.decay, finetune.momentum, steps, sampler.steps_per_epoch, metric == "map11",
            self.config.seed, pick_precision(runtime.precision, device),
        )  # fmt: skip
        task = FinetuneTask(self.extractor.encoder, len(known.classes), tuning, device, world)
        cache = world.broadcast_from_main(lambda: resolve_cache(self.config.data.cache, source, device))
        flip = AugmentConfig(
            hflip_prob=finetune.hflip_prob,
            color_jitter_prob=0,
            grayscale_prob=0,
            blur_prob=(0, 0),
            solarize_prob=(0, 0),
        )
        feed = ViewLoader(
            source, sampler, ViewSpec((CropSpec(1, self.extractor.size, finetune.scale),), finetune.ratio, flip),
            LoaderConfig(
                self.config.seed, device, world, cache=cache, workers=resolve_num_workers(runtime, device, cache)
            ),
            self.extractor.collect_bad_images(LabelledDataset(source, known.labels[rows], known.classes)),
        )  # fmt: skip
        saving = self.config.checkpoint
        plan = LoopConfig(
            total=steps, steps_per_epoch=sampler.steps_per_epoch, batch_size=sampler.batch_size,
            log_every=runtime.log_every, checkpoint_every=saving.every_steps, checkpoint_minutes=saving.every_minutes,
            resume_command=f"relicctl transfer --resume {self.run}", lr_key="finetune.lrs",
        )  # fmt: skip

        with closing(open_sub_run(world, path, parent=self.run, keep=saving.keep)) as run:
            loaded = load_newest_checkpoint(run, world, self.console.warn)
            progress = TrainState() if loaded is None else restore_state(task, loaded[1], loaded[2], str(loaded[0]))
            if world.is_main:
                run.truncate_metrics(progress.step or -1)
            with self.console.progress(plan.total, progress.step) as bar:
                train(
                    task,
                    feed,
                    plan,
                    run,
                    state=progress,
                    device=device,
                    world=world,
                    on_log=lambda step, figures: bar.update(step, select_progress_metrics(figures)),
                )
        return task.model.eval()


@dataclass(frozen=True)
class FinetuneParams:
    """One training: ``rate`` falls along a cosine to 0 over ``steps``; ``decay`` is on all parameters.

    ``one_vs_rest``: each class has its own sigmoid.
    """

    lr: float
    weight_decay: float
    momentum: float
    steps: int
    steps_per_epoch: int
    one_vs_rest: bool
    seed: int
    precision: str


class FinetuneTask(Task):
    """The loop's task. ``encoder`` itself is left as it is; ``state`` is a copy of it and a linear layer.

    Each process of ``world`` has its rows of the global batch; BatchNorm and gradients are taken over all of them.
    """

    def __init__(
        self, encoder: Any, classes: int, params: FinetuneParams, device: torch.device, world: World = SINGLE_PROCESS
    ) -> None:
        split = world is not None and world.size > 1
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
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            network.parameters(),
            params.lr,
            params.momentum,
            weight_decay=params.weight_decay,
            nesterov=True,
            foreach=True,
        )
        self._network: nn.Module = DistributedDataParallel(self.model) if split else self.model
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=params.precision == "bf16")

    def compute_loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Cross-entropy of a softmax; of a sigmoid for each class where each is ranked by itself.

        Labels int8 ``[B, C]`` are 1 and -1, and 0 where an image does not count for a class: it adds 0 to the mean.
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
    """Of BatchNorm's running statistics, 1 - decay as torch has it: BYOL's decay is max(1 - 10 / s, 0.9)."""
    return 1 - max(1 - 10 / steps_per_epoch, 0.9)
