"""From hand-made priors to a trained mask network: labels, rounds of self-training, the final network.

Every stage leaves its outcome in RUN/stages when it is finished, and a resumed run takes it from there. The stage
under way goes on from its checkpoint; steps are counted through all stages, so that checkpoints and metrics
are in one order. Nothing here sees a true mask: images and prior maps are all that comes in.

Several processes make labels together and train on one batch. What they leave, the main one writes and all read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relicctl.bgmask.images import InMemoryImages
from relicctl.bgmask.network import (
    SALIENCY_FILE_NAME,
    SaliencyNet,
    init_saliency_net,
    load_saliency_net,
    save_saliency_net,
)
from relicctl.bgmask.predict import predict_saliency
from relicctl.bgmask.prior_cache import PriorCache
from relicctl.bgmask.priors.maps import build_prior_channels
from relicctl.bgmask.refine import fuse_priors, refine_maps
from relicctl.bgmask.training import LossWeights, MaskAugmentation, MaskLoader, MaskTask, MaskTrainingSet
from relicctl.config.bgmask import BgmaskConfig
from relicctl.core import checkpoint
from relicctl.core.counter_rng import Stream, derive_seed
from relicctl.core.distributed import SINGLE_PROCESS, World
from relicctl.core.hardware import count_process_cores
from relicctl.core.loop import LoopConfig, TrainState, restore_state, train
from relicctl.core.work_sharing import WorkResult, gather_in_order, shard
from relicctl.data.photometric import AugmentConfig
from relicctl.errors import UsageError
from relicctl.runs.folder import RunFolder

LABEL_BATCH_SIZE = 64  # images whose labels are made together


@dataclass(frozen=True)
class Stage:
    """One training: the last is the final network's. Its steps are ``first`` to ``last - 1`` of the whole run."""

    number: int
    name: str
    epochs: int
    first: int
    last: int


def list_stages(config: BgmaskConfig, images: int) -> list[Stage]:
    """The trainings of a run on ``images`` images, in their order."""
    count, stages, first = config.rounds.count, [], 0
    steps_per_epoch = _count_training_images(config, images) // config.optim.batch_size
    for number in range(count + 1):
        final = number == count
        epochs = config.optim.epochs if final else config.rounds.epochs
        last = first + epochs * steps_per_epoch
        stages.append(Stage(number, "final" if final else f"round {number + 1}", epochs, first, last))
        first = last
    return stages


def count_total_steps(config: BgmaskConfig, images: int) -> int:
    """Steps of all trainings together."""
    return list_stages(config, images)[-1].last


def run_self_training(
    config: BgmaskConfig,
    photos: InMemoryImages,
    store: PriorCache,
    run: RunFolder,
    *,
    device: torch.device,
    precision: str,
    show: Callable[[int, dict[str, Any]], None],
    on_stage_end: Callable[[str, SaliencyNet], None],
    warn: Callable[[str], None],
    resume_command: str,
    world: World = SINGLE_PROCESS,
) -> SaliencyNet:
    """Run or go on with all stages; the final network, in eval mode, which is also RUN/saliency.safetensors.

    ``photos`` and the maps of ``store`` are squashed to the same side. ``stage(name, net)`` is called for every
    finished training, those of an earlier process too. ``show`` is given the loop's records.
    """
    prior_channels = (
        build_prior_channels(store.maps[photos.indices], store.valid[photos.indices]) if config.model.priors else None
    )
    self_training = _SelfTraining(
        config, photos, prior_channels, run, device, precision, show, warn, resume_command, world
    )
    labels = self_training.make_initial_labels(store)
    for part in list_stages(config, len(photos)):
        net = self_training.load_or_train(part, labels)
        on_stage_end(part.name, net)
        if part.name != "final":
            labels = self_training.update_labels(part, labels, net)
    world.broadcast_from_main(lambda: save_saliency_net(run.path / SALIENCY_FILE_NAME, net))
    return net


@dataclass(frozen=True)
class SoftLabels:
    """uint8 ``[K, S, S]``, 255 = object; how far each image's may be trusted, float32 ``[K]``."""

    maps: Tensor
    trust: Tensor


@dataclass(frozen=True)
class _SelfTraining:
    """What all stages share."""

    config: BgmaskConfig
    photos: InMemoryImages
    prior_channels: Tensor | None
    run: RunFolder
    device: torch.device
    precision: str
    show: Callable[[int, dict[str, Any]], None]
    warn: Callable[[str], None]
    resume_command: str
    world: World

    def make_initial_labels(self, store: PriorCache) -> SoftLabels:
        """The first labels: what the priors make together."""

        def fuse_batch(rows: slice, images: Tensor) -> tuple[Tensor, Tensor]:
            samples = self.photos.indices[rows]
            maps = torch.from_numpy(store.maps[samples]).to(self.device).float() / 255
            valid = torch.from_numpy(store.valid[samples]).to(self.device)
            fused = fuse_priors(images, maps, valid, self.config.refine, count_process_cores())
            return fused.map, fused.agreement

        return self._load_or_make_labels("labels", fuse_batch)

    def update_labels(self, stage: Stage, old: SoftLabels, net: SaliencyNet) -> SoftLabels:
        """The labels' moving average: ``refine.keep`` of the old ones, the rest what ``net`` says, sharpened."""
        keep = self.config.refine.keep

        def predict_batch(rows: slice, images: Tensor) -> tuple[Tensor, Tensor]:
            predicted = predict_saliency(
                net,
                images,
                None if self.prior_channels is None else self.prior_channels[rows],
                options=self.config.predict.model_copy(update={"refine": "none"}),
                refine=self.config.refine,
                device=self.device,
                precision=self.precision,
            )
            fresh = refine_maps(images, predicted.to(self.device), self.config.refine, count_process_cores())
            old_maps = old.maps[rows].to(self.device).float() / 255
            return keep * old_maps + (1 - keep) * fresh.map, fresh.agreement

        return self._load_or_make_labels(f"labels after {stage.name}", predict_batch)

    def _load_or_make_labels(self, name: str, make: Callable[[slice, Tensor], tuple[Tensor, Tensor]]) -> SoftLabels:
        """Labels of an earlier process, or made now and kept."""

        def label_batch(rows: slice) -> WorkResult:
            maps, trust = make(rows, self.photos.images[rows].to(self.device))
            return WorkResult(((255 * maps).round().to(torch.uint8).cpu(), trust.cpu()))

        def label_all() -> dict[str, Tensor]:
            pieces: list[WorkResult] = []
            batches = [slice(first, first + LABEL_BATCH_SIZE) for first in range(0, len(self.photos), LABEL_BATCH_SIZE)]
            gather_in_order(self.world, len(batches), map(label_batch, shard(self.world, batches)), pieces.append)
            if not pieces:  # of a process that is not the main one
                return {}
            maps, trust = map(torch.cat, zip(*(piece.tensors for piece in pieces), strict=True))
            return {"maps": maps, "trust": trust}

        return SoftLabels(**self._load_or_make(name, label_all))

    def load_or_train(self, stage: Stage, labels: SoftLabels) -> SaliencyNet:
        """The stage's network: of an earlier process, or trained now."""
        net = self._build_empty_net(stage)
        net.load_state_dict(self._load_or_make(stage.name, lambda: self._train(stage, labels)))
        return net.to(self.device).to(memory_format=torch.channels_last).eval()

    def _build_empty_net(self, stage: Stage) -> SaliencyNet:
        """The stage's network, to be filled: of a finished run even where the encoder that it began from is gone."""
        try:
            return load_saliency_net(self.run.path)
        except UsageError:
            return init_saliency_net(self.config, stage.number)

    def _train(self, stage: Stage, labels: SoftLabels) -> dict[str, Tensor]:
        """From the stage's checkpoint if it has one; the trained network's tensors."""
        net = init_saliency_net(self.config, stage.number).to(self.device).to(memory_format=torch.channels_last)
        config, data = self.config, self._select_training_set(labels)
        batches = MaskLoader(
            data,
            _build_augmentation(config),
            size=config.model.size,
            batch_size=config.optim.batch_size,
            seed=derive_seed(config.seed, Stream.MASK, stage.number),
            first=stage.first,
            world=self.world,
        )
        per_epoch = batches.sampler.steps_per_epoch
        task = MaskTask(
            net,
            LossWeights(**config.loss.model_dump()),
            rate=config.optim.base_lr,
            weight_decay=config.optim.weight_decay,
            warmup=round(min(config.optim.warmup_epochs, stage.epochs) * per_epoch),
            steps=stage.last - stage.first,
            first=stage.first,
            stage=stage.number,
            autocast=torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
            world=self.world,
        )
        plan = LoopConfig(
            total=stage.last,
            steps_per_epoch=per_epoch,
            batch_size=config.optim.batch_size,
            log_every=config.runtime.log_every,
            checkpoint_every=config.checkpoint.every_steps,
            checkpoint_minutes=config.checkpoint.every_minutes,
            resume_command=self.resume_command,
        )
        progress = self._restore_progress(stage, task)
        train(task, batches, plan, self.run, state=progress, device=self.device, world=self.world, on_log=self.show)
        return task.model.state_dict()

    def _restore_progress(self, stage: Stage, task: MaskTask) -> TrainState:
        """Where the stage stands: at its newest checkpoint, or at its beginning."""
        path = self.world.broadcast_from_main(lambda: self._find_checkpoint(stage))
        if path is None:
            self.run.truncate_metrics(stage.first if stage.first else -1)
            return TrainState(stage.first)
        tensors, header = checkpoint.load_checkpoint(Path(path))
        self.run.truncate_metrics(header["step"])
        return restore_state(task, tensors, header, path)

    def _find_checkpoint(self, stage: Stage) -> str | None:
        """The newest checkpoint of the stage that can be read."""
        for path in checkpoint.list_checkpoints(self.run.checkpoints_dir):
            if path.name > checkpoint.format_checkpoint_name(
                stage.last
            ):  # of stages that followed an outcome since lost
                path.unlink()
        found = checkpoint.load_newest_valid(self.run.checkpoints_dir, self.warn)
        return str(found[0]) if found is not None and found[2]["step"] > stage.first else None

    def _select_training_set(self, labels: SoftLabels) -> MaskTrainingSet:
        """The images whose labels are trusted most, and the pixels' weights: less where a label is undecided."""
        count = _count_training_images(self.config, len(self.photos))
        chosen = torch.argsort(labels.trust, descending=True, stable=True)[:count].sort().values
        maps = labels.maps[chosen]
        certainty = (maps.float() / 127.5 - 1).abs()
        weights = 1 - self.config.labels.agreement * (1 - certainty)
        planes = [self.photos.images[chosen], maps[:, None], (255 * weights[:, None]).round().to(torch.uint8)]
        planes += [] if self.prior_channels is None else [self.prior_channels[chosen]]
        return MaskTrainingSet(*(plane.to(self.device) for plane in planes))

    # The outcomes in RUN/stages

    def _load_or_make(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What a finished stage left, or what ``make`` gives the main process now, which writes it; all read it."""
        path = self.run.path / "stages" / f"{name.replace(' ', '-')}.safetensors"
        if not self.world.broadcast_from_main(lambda: self._is_readable(path)):
            tensors = make()
            self.world.broadcast_from_main(lambda: checkpoint.save_checkpoint(path, tensors, {}))
        return checkpoint.load_checkpoint(path)[0]

    def _is_readable(self, path: Path) -> bool:
        if not path.exists():
            return False
        try:
            checkpoint.load_checkpoint(path)
        except checkpoint.BrokenCheckpoint as broken:
            self.warn(f"{broken.what} It is made again.")
            return False
        return True


def _count_training_images(config: BgmaskConfig, images: int) -> int:
    """How many images are trained on."""
    return max(min(images, 2), round((1 - config.labels.drop) * images))


def _build_augmentation(config: BgmaskConfig) -> MaskAugmentation:
    augment = config.augment
    photometric = AugmentConfig(
        flip=augment.flip,
        jitter=augment.jitter,
        brightness=augment.brightness,
        contrast=augment.contrast,
        saturation=augment.saturation,
        hue=augment.hue,
        grayscale=augment.grayscale,
        blur=(augment.blur, augment.blur),
        solarize=(0.0, 0.0),
    )
    return MaskAugmentation(augment.area, augment.aspect, photometric)
