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

from relicctl.config.bgmask import BgmaskConfig
from relicctl.core import checkpoint
from relicctl.core.counted import Stream, counted_seed
from relicctl.core.distributed import World
from relicctl.core.hardware import own_cores
from relicctl.core.loop import Plan, Progress, restore, train
from relicctl.core.turns import Piece, in_turn, own
from relicctl.data.augment import Photometric
from relicctl.errors import UsageError
from relicctl.runs import RunFolder
from relicctl.saliency.hints import hints
from relicctl.saliency.nets import FILE_NAME, SaliencyNet, load_saliency, open_net, save_saliency
from relicctl.saliency.photos import Photos
from relicctl.saliency.predict import predict
from relicctl.saliency.prior_store import PriorStore
from relicctl.saliency.refine import fuse, sharpen
from relicctl.saliency.training import Labelled, LossWeights, MaskBatches, MaskTraining, Views

__all__ = ["SaliencyNet", "load_saliency", "open_net", "run_recipe", "total_steps"]

AT_ONCE = 64  # images whose labels are made together


@dataclass(frozen=True)
class Stage:
    """One training: the last is the final network's. Its steps are ``first`` to ``last - 1`` of the whole run."""

    number: int
    name: str
    epochs: int
    first: int
    last: int


def stages_of(config: BgmaskConfig, images: int) -> list[Stage]:
    """The trainings of a run on ``images`` images, in their order."""
    count, stages, first = config.rounds.count, [], 0
    steps_per_epoch = _kept(config, images) // config.optim.batch_size
    for number in range(count + 1):
        final = number == count
        epochs = config.optim.epochs if final else config.rounds.epochs
        last = first + epochs * steps_per_epoch
        stages.append(Stage(number, "final" if final else f"round {number + 1}", epochs, first, last))
        first = last
    return stages


def total_steps(config: BgmaskConfig, images: int) -> int:
    """Steps of all trainings together."""
    return stages_of(config, images)[-1].last


def run_recipe(
    config: BgmaskConfig,
    photos: Photos,
    store: PriorStore,
    run: RunFolder,
    *,
    device: torch.device,
    precision: str,
    show: Callable[[int, dict[str, Any]], None],
    stage: Callable[[str, SaliencyNet], None],
    warn: Callable[[str], None],
    resume_command: str,
    world: World | None = None,
) -> SaliencyNet:
    """Run or go on with all stages; the final network, in eval mode, which is also RUN/saliency.safetensors.

    ``photos`` and the maps of ``store`` are squashed to the same side. ``stage(name, net)`` is called for every
    finished training, those of an earlier process too. ``show`` is given the loop's records.
    """
    world = world or World()
    given = hints(store.maps[photos.indices], store.valid[photos.indices]) if config.model.priors else None
    recipe = _Recipe(config, photos, given, run, device, precision, show, warn, resume_command, world)
    labels = recipe.labels(store)
    for part in stages_of(config, len(photos)):
        net = recipe.trained(part, labels)
        stage(part.name, net)
        if part.name != "final":
            labels = recipe.relabelled(part, labels, net)
    world.lead(lambda: save_saliency(run.path / FILE_NAME, net))
    return net


@dataclass(frozen=True)
class SoftLabels:
    """uint8 ``[K, S, S]``, 255 = object; how far each image's may be trusted, float32 ``[K]``."""

    maps: Tensor
    trust: Tensor


@dataclass(frozen=True)
class _Recipe:
    """What all stages share."""

    config: BgmaskConfig
    photos: Photos
    hints: Tensor | None
    run: RunFolder
    device: torch.device
    precision: str
    show: Callable[[int, dict[str, Any]], None]
    warn: Callable[[str], None]
    resume_command: str
    world: World

    def labels(self, store: PriorStore) -> SoftLabels:
        """The first labels: what the priors make together."""

        def make(rows: slice, images: Tensor) -> tuple[Tensor, Tensor]:
            samples = self.photos.indices[rows]
            maps = torch.from_numpy(store.maps[samples]).to(self.device).float() / 255
            valid = torch.from_numpy(store.valid[samples]).to(self.device)
            fused = fuse(images, maps, valid, self.config.refine, own_cores())
            return fused.map, fused.agreement

        return self._kept_labels("labels", make)

    def relabelled(self, part: Stage, old: SoftLabels, net: SaliencyNet) -> SoftLabels:
        """The labels' moving average: ``refine.keep`` of the old ones, the rest what ``net`` says, sharpened."""
        keep = self.config.refine.keep

        def make(rows: slice, images: Tensor) -> tuple[Tensor, Tensor]:
            found = predict(
                net,
                images,
                None if self.hints is None else self.hints[rows],
                options=self.config.predict.model_copy(update={"refine": "none"}),
                refine=self.config.refine,
                device=self.device,
                precision=self.precision,
            )
            fresh = sharpen(images, found.to(self.device), self.config.refine, own_cores())
            before = old.maps[rows].to(self.device).float() / 255
            return keep * before + (1 - keep) * fresh.map, fresh.agreement

        return self._kept_labels(f"labels after {part.name}", make)

    def _kept_labels(self, name: str, make: Callable[[slice, Tensor], tuple[Tensor, Tensor]]) -> SoftLabels:
        """Labels of an earlier process, or made now and kept."""

        def made(rows: slice) -> Piece:
            maps, trust = make(rows, self.photos.images[rows].to(self.device))
            return Piece(((255 * maps).round().to(torch.uint8).cpu(), trust.cpu()))

        def all_made() -> dict[str, Tensor]:
            pieces: list[Piece] = []
            batches = [slice(first, first + AT_ONCE) for first in range(0, len(self.photos), AT_ONCE)]
            in_turn(self.world, len(batches), map(made, own(self.world, batches)), pieces.append)
            if not pieces:  # of a process that is not the main one
                return {}
            maps, trust = map(torch.cat, zip(*(piece.tensors for piece in pieces), strict=True))
            return {"maps": maps, "trust": trust}

        return SoftLabels(**self._outcome(name, all_made))

    def trained(self, part: Stage, labels: SoftLabels) -> SaliencyNet:
        """The stage's network: of an earlier process, or trained now."""
        net = self._outline(part)
        net.load_state_dict(self._outcome(part.name, lambda: self._train(part, labels)))
        return net.to(self.device).to(memory_format=torch.channels_last).eval()

    def _outline(self, part: Stage) -> SaliencyNet:
        """The stage's network, to be filled: of a finished run even where the encoder that it began from is gone."""
        try:
            return load_saliency(self.run.path)
        except UsageError:
            return open_net(self.config, part.number)

    def _train(self, part: Stage, labels: SoftLabels) -> dict[str, Tensor]:
        """From the stage's checkpoint if it has one; the trained network's tensors."""
        net = open_net(self.config, part.number).to(self.device).to(memory_format=torch.channels_last)
        config, data = self.config, self._training_set(labels)
        batches = MaskBatches(
            data,
            _views(config),
            size=config.model.size,
            batch_size=config.optim.batch_size,
            seed=counted_seed(config.seed, Stream.MASK, part.number),
            first=part.first,
            world=self.world,
        )
        per_epoch = batches.sampler.steps_per_epoch
        task = MaskTraining(
            net,
            LossWeights(**config.loss.model_dump()),
            rate=config.optim.base_lr,
            weight_decay=config.optim.weight_decay,
            warmup=round(min(config.optim.warmup_epochs, part.epochs) * per_epoch),
            steps=part.last - part.first,
            first=part.first,
            stage=part.number,
            autocast=torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
            world=self.world,
        )
        plan = Plan(
            total=part.last,
            steps_per_epoch=per_epoch,
            batch_size=config.optim.batch_size,
            log_every=config.runtime.log_every,
            checkpoint_every=config.checkpoint.every_steps,
            checkpoint_minutes=config.checkpoint.every_minutes,
            resume_command=self.resume_command,
        )
        progress = self._under_way(part, task)
        train(task, batches, plan, self.run, progress=progress, device=self.device, world=self.world, show=self.show)
        return task.state.state_dict()

    def _under_way(self, part: Stage, task: MaskTraining) -> Progress:
        """Where the stage stands: at its newest checkpoint, or at its beginning."""
        path = self.world.lead(lambda: self._newest(part))
        if path is None:
            self.run.rewind_metrics(part.first if part.first else -1)
            return Progress(part.first)
        tensors, header = checkpoint.load(Path(path))
        self.run.rewind_metrics(header["step"])
        return restore(task, tensors, header, path)

    def _newest(self, part: Stage) -> str | None:
        """The newest checkpoint of the stage that can be read."""
        for path in checkpoint.listed(self.run.checkpoints):
            if path.name > checkpoint.file_name(part.last):  # of stages that followed an outcome since lost
                path.unlink()
        found = checkpoint.newest_valid(self.run.checkpoints, self.warn)
        return str(found[0]) if found is not None and found[2]["step"] > part.first else None

    def _training_set(self, labels: SoftLabels) -> Labelled:
        """The images whose labels are trusted most, and the pixels' weights: less where a label is undecided."""
        count = _kept(self.config, len(self.photos))
        chosen = torch.argsort(labels.trust, descending=True, stable=True)[:count].sort().values
        maps = labels.maps[chosen]
        decided = (maps.float() / 127.5 - 1).abs()
        weights = 1 - self.config.labels.agreement * (1 - decided)
        planes = [self.photos.images[chosen], maps[:, None], (255 * weights[:, None]).round().to(torch.uint8)]
        planes += [] if self.hints is None else [self.hints[chosen]]
        return Labelled(*(plane.to(self.device) for plane in planes))

    # The outcomes in RUN/stages

    def _outcome(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What a finished stage left, or what ``make`` gives the main process now, which writes it; all read it."""
        path = self.run.path / "stages" / f"{name.replace(' ', '-')}.safetensors"
        if not self.world.lead(lambda: self._readable(path)):
            made = make()
            self.world.lead(lambda: checkpoint.save(path, made, {}))
        return checkpoint.load(path)[0]

    def _readable(self, path: Path) -> bool:
        if not path.exists():
            return False
        try:
            checkpoint.load(path)
        except checkpoint.BrokenCheckpoint as broken:
            self.warn(f"{broken.what} It is made again.")
            return False
        return True


def _kept(config: BgmaskConfig, images: int) -> int:
    """How many images are trained on."""
    return max(min(images, 2), round((1 - config.labels.drop) * images))


def _views(config: BgmaskConfig) -> Views:
    augment = config.augment
    photometric = Photometric(
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
    return Views(augment.area, augment.aspect, photometric)
