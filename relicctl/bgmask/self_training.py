"""From handcrafted priors to a trained mask network: labels, rounds of self-training, the final network.

Every finished stage is saved under RUN/stages, and a resumed run loads it from there. The stage in progress resumes
from its checkpoint; steps are counted through all stages, so that checkpoints and metrics are in one order. Nothing
here sees a true mask: images and prior maps are the only input.

Several ranks make labels together and train on one batch. The main one writes what is saved, and all read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from relicctl.bgmask import network
from relicctl.bgmask.images import InMemoryImages
from relicctl.bgmask.network import SaliencyNet, init_saliency_net
from relicctl.bgmask.predict import SaliencyPredictor
from relicctl.bgmask.prior_cache import PriorCache
from relicctl.bgmask.priors.maps import build_prior_channels
from relicctl.bgmask.refine import RefinedLabels, fuse_priors, refine_maps
from relicctl.bgmask.training import MaskAugmentation, MaskLoader, MaskTask, MaskTrainingSet, Stage
from relicctl.config.bgmask import BgmaskConfig
from relicctl.core import checkpoint
from relicctl.core.counter_rng import Stream, derive_seed
from relicctl.core.hardware import count_process_cores
from relicctl.core.loop import LoopConfig
from relicctl.core.work_sharing import WorkResult, gather_in_order, shard
from relicctl.data.photometric import AugmentConfig
from relicctl.errors import UsageError
from relicctl.runs.distributed import RunContext
from relicctl.runs.training import restore_or_start, train_with_progress

LABEL_BATCH_SIZE = 64  # images whose labels are made together


def run_self_training(
    config: BgmaskConfig,
    images: InMemoryImages,
    priors: PriorCache,
    context: RunContext,
    *,
    resume_command: str,
    on_stage_end: Callable[[str, SaliencyNet], None] = lambda name, net: None,
) -> SaliencyNet:
    """Run or resume all stages; return the final network, in eval mode, which is also RUN/saliency.safetensors.

    ``images`` and the maps of ``priors`` are squares of the same side. ``on_stage_end(name, net)`` is called for every
    finished training, also one that an earlier process finished.
    """
    prior_channels = None
    if config.model.prior_channels:
        prior_channels = build_prior_channels(priors.maps[images.indices], priors.valid[images.indices])
    training = _SelfTraining(config, images, prior_channels, context, resume_command)
    labels = training.make_initial_labels(priors)
    for stage in list_stages(config, len(images)):
        net = training.load_or_train(stage, labels)
        on_stage_end(stage.name, net)
        if stage.name != "final":
            labels = training.update_labels(stage, labels, net)
    path = context.run.path / network.SALIENCY_FILE_NAME
    context.world.broadcast_from_main(lambda: network.save_saliency_net(path, net))
    return net


def list_stages(config: BgmaskConfig, num_images: int) -> list[Stage]:
    """Return the trainings of a run on ``num_images`` images, in their order."""
    rounds = config.self_training.rounds
    trainings = [(f"round {number + 1}", config.self_training.epochs) for number in range(rounds)]
    steps_per_epoch = _count_training_images(config, num_images) // config.optim.batch_size
    stages, first = [], 0
    for number, (name, epochs) in enumerate([*trainings, ("final", config.optim.epochs)]):
        stages.append(Stage(number, name, epochs, first, first + epochs * steps_per_epoch))
        first = stages[-1].last
    return stages


def count_total_steps(config: BgmaskConfig, num_images: int) -> int:
    """Return the steps of all trainings together. Raises UsageError when the images do not fill one batch."""
    total = list_stages(config, num_images)[-1].last
    if not total:
        raise UsageError(
            f"The batch of {config.optim.batch_size} images is larger than the training set: "
            f"{num_images} images less the fraction {config.labels.drop_fraction:g} with the least certain labels.",
            "Lower optim.batch_size or labels.drop_fraction, or give more images.",
        )
    return total


@dataclass(frozen=True)
class SoftLabels:
    """uint8 ``maps``, ``[K, S, S]``, 255 = object; ``trust``, float32 ``[K]``: how certain each image's label is."""

    maps: Tensor
    trust: Tensor


@dataclass(frozen=True)
class _SelfTraining:
    """What all stages share."""

    config: BgmaskConfig
    images: InMemoryImages
    prior_channels: Tensor | None
    context: RunContext
    resume_command: str

    def make_initial_labels(self, priors: PriorCache) -> SoftLabels:
        """Fuse the priors into the first labels."""

        def fuse_batch(rows: slice, images: Tensor) -> RefinedLabels:
            indices = self.images.indices[rows]
            maps = torch.from_numpy(priors.maps[indices]).to(images.device).float() / 255
            valid = torch.from_numpy(priors.valid[indices]).to(images.device)
            return fuse_priors(images, maps, valid, self.config.refine, count_process_cores())

        return self._load_or_make_labels("labels", fuse_batch)

    def update_labels(self, stage: Stage, old: SoftLabels, net: SaliencyNet) -> SoftLabels:
        """Update the labels' moving average: ``refine.label_momentum`` of the old ones, and refined maps of ``net``."""
        keep = self.config.refine.label_momentum
        unrefined = self.config.predict.model_copy(update={"refine": "none"})
        predictor = replace(SaliencyPredictor.from_config(net, self.config, self.context), options=unrefined)

        def predict_batch(rows: slice, images: Tensor) -> RefinedLabels:
            predicted = predictor.predict(images, None if self.prior_channels is None else self.prior_channels[rows])
            new = refine_maps(images, predicted.to(images.device), self.config.refine, count_process_cores())
            old_maps = old.maps[rows].to(images.device).float() / 255
            return replace(new, map=keep * old_maps + (1 - keep) * new.map)

        return self._load_or_make_labels(f"labels after {stage.name}", predict_batch)

    def _load_or_make_labels(self, name: str, make: Callable[[slice, Tensor], RefinedLabels]) -> SoftLabels:
        """Load the labels of an earlier process, or make them batch by batch and save them."""
        world = self.context.world

        def label_batch(rows: slice) -> WorkResult:
            labels = make(rows, self.images.images[rows].to(self.context.device))
            return WorkResult(((255 * labels.map).round().to(torch.uint8).cpu(), labels.agreement.cpu()))

        def label_all() -> dict[str, Tensor]:
            results: list[WorkResult] = []
            batches = [slice(first, first + LABEL_BATCH_SIZE) for first in range(0, len(self.images), LABEL_BATCH_SIZE)]
            gather_in_order(world, len(batches), map(label_batch, shard(world, batches)), results.append)
            if not results:  # not the main rank
                return {}
            maps, trust = map(torch.cat, zip(*(result.tensors for result in results), strict=True))
            return {"maps": maps, "trust": trust}

        return SoftLabels(**self._load_or_make(name, label_all))

    def load_or_train(self, stage: Stage, labels: SoftLabels) -> SaliencyNet:
        """Return the stage's network: saved by an earlier process, or trained now."""
        try:  # a finished run needs the encoder that it started from no more
            net = network.load_saliency_net(self.context.run.path)
        except UsageError:
            net = init_saliency_net(self.config, stage.number)
        net.load_state_dict(self._load_or_make(stage.name, lambda: self._train(stage, labels)))
        return net.to(self.context.device).to(memory_format=torch.channels_last).eval()

    def _train(self, stage: Stage, labels: SoftLabels) -> dict[str, Tensor]:
        """Train from the stage's checkpoint if it has one; return the network's tensors."""
        config, context = self.config, self.context
        net = init_saliency_net(config, stage.number).to(context.device).to(memory_format=torch.channels_last)
        task = MaskTask(net, config.loss, config.optim, stage, context.autocast(), context.world)
        batches = MaskLoader(
            self._select_training_set(labels), _build_augmentation(config), batch_size=config.optim.batch_size,
            seed=derive_seed(config.seed, Stream.MASK, stage.number), first=stage.first, world=context.world,
        )  # fmt: skip
        loop = LoopConfig.from_sections(
            config.checkpoint, config.runtime, total=stage.last, steps_per_epoch=stage.steps_per_epoch,
            batch_size=config.optim.batch_size, resume_command=self.resume_command,
        )  # fmt: skip
        for path in checkpoint.list_checkpoints(context.run.checkpoints_dir) if context.world.is_main else []:
            if path.name > checkpoint.format_checkpoint_name(stage.last):  # of a later stage, since this one was lost
                path.unlink()
        train_with_progress(task, batches, loop, context, restore_or_start(task, context, first=stage.first))
        return task.model.state_dict()

    def _select_training_set(self, labels: SoftLabels) -> MaskTrainingSet:
        """Select the images with the most certain labels; pixels weigh less where a label is undecided."""
        count = _count_training_images(self.config, len(self.images))
        chosen = torch.argsort(labels.trust, descending=True, stable=True)[:count].sort().values
        maps = labels.maps[chosen]
        certainty = (maps.float() / 127.5 - 1).abs()
        weights = 1 - self.config.labels.uncertainty_weight * (1 - certainty)
        planes = [self.images.images[chosen], maps[:, None], (255 * weights[:, None]).round().to(torch.uint8)]
        planes += [] if self.prior_channels is None else [self.prior_channels[chosen]]
        return MaskTrainingSet(*(plane.to(self.context.device) for plane in planes))

    def _load_or_make(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Load a finished stage from RUN/stages; or ``make`` it on all ranks and save the main one's."""
        path = self.context.run.path / "stages" / f"{name.replace(' ', '-')}.safetensors"
        if not self.context.world.broadcast_from_main(lambda: self._is_readable(path)):
            tensors = make()
            self.context.world.broadcast_from_main(lambda: checkpoint.save_checkpoint(path, tensors, {}))
        return checkpoint.load_checkpoint(path)[0]

    def _is_readable(self, path: Path) -> bool:
        if not path.exists():
            return False
        try:
            checkpoint.load_checkpoint(path)
        except checkpoint.BrokenCheckpoint as broken:
            self.context.console.warn(f"{broken.what} It is computed again.")
            return False
        return True


def _count_training_images(config: BgmaskConfig, num_images: int) -> int:
    """Return how many images are trained on: those with the least certain labels are dropped."""
    return max(min(num_images, 2), round((1 - config.labels.drop_fraction) * num_images))


def _build_augmentation(config: BgmaskConfig) -> MaskAugmentation:
    augment = config.augment
    same_names = augment.model_dump(exclude={"scale", "ratio", "blur_prob"})
    photometric = AugmentConfig(**same_names, blur_prob=(augment.blur_prob,) * 2, solarize_prob=(0.0, 0.0))
    return MaskAugmentation(config.model.size, augment.scale, augment.ratio, photometric)
