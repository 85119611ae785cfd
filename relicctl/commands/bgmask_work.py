"""The steps of ``train-bgmask``: each leaves its result in the run's folder, and finds it there when resumed.

The processes of a run take every step together.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relicctl.commands.bgmask_job import BgmaskData
from relicctl.commands.common import readable
from relicctl.config.bgmask import BgmaskConfig
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.core.hardware import own_cores
from relicctl.data.bad_images import BadImages
from relicctl.data.masks import FILE_NAME, SET_ASIDE, MaskBank
from relicctl.data.sources import Source
from relicctl.errors import DataError
from relicctl.runs import RunFolder
from relicctl.saliency import sheet
from relicctl.saliency.hints import hints
from relicctl.saliency.measures import FIGURES, agreement, mean_agreement
from relicctl.saliency.nets import SaliencyNet
from relicctl.saliency.photos import Photos, load_photos
from relicctl.saliency.predict import make_bank, predict
from relicctl.saliency.prior_store import PriorStore
from relicctl.saliency.priors import NAMES
from relicctl.saliency.recipe import run_recipe, total_steps
from relicctl.saliency.stages import StageTable

TITLES = ("max-F", "F at .5", "MAE", "IoU", "accuracy", "S", "E")  # of FIGURES, in their order


class Work:
    """One run's work, step by step in the order of the methods."""

    def __init__(
        self,
        run: RunFolder,
        config: BgmaskConfig,
        data: BgmaskData,
        device: torch.device,
        precision: str,
        console: Console,
        world: World,
    ) -> None:
        self._run, self._config, self._data = run, config, data
        self._device, self._precision, self._console, self._world = device, precision, console, world
        self._cores = own_cores()
        self._workers = config.runtime.workers if config.runtime.workers != "auto" else self._cores
        self._listed = run.read_bad_images()

    def photos(self) -> Photos:
        """All images to train on, squashed, in memory."""
        source = self._data.train
        with self._telling("reading", len(source)) as show:
            size, bad = self._config.labels.size, self._bad_images(source)
            return load_photos(source, size, workers=self._workers, bad=bad, show=show, world=self._world)

    def priors(self) -> PriorStore:
        """The hand-made maps of the images to train on."""
        return self._filled("priors", self._data.train, self._config.labels.size)

    def table(self) -> StageTable | None:
        """The stages before training, measured, if there are true masks to measure on."""
        truth = self._data.truth
        if truth is None:
            return None
        store = self._filled(f"priors-eval-{truth.images.fingerprint()[:8]}", truth.images, self._config.labels.size)
        table = StageTable(
            truth,
            store,
            self._config,
            device=self._device,
            precision=self._precision,
            workers=self._workers,
            threads=self._cores,
            told=lambda row: self._console.note(in_short(row)),
            world=self._world,
        )
        table.add_priors()
        return table

    def train(self, photos: Photos, store: PriorStore, table: StageTable | None, resume_command: str) -> SaliencyNet:
        """The rounds and the final network; each is measured when it is done."""
        with self._console.progress(total_steps(self._config, len(photos))) as bar:
            return run_recipe(
                self._config,
                photos,
                store,
                self._run,
                device=self._device,
                precision=self._precision,
                show=lambda step, figures: bar.update(step, readable(figures)),
                stage=lambda name, net: table.add_net(name, net) if table else None,
                warn=self._console.warn,
                resume_command=resume_command,
                world=self._world,
            )

    def make_masks(self, net: SaliencyNet, store: PriorStore) -> None:
        """The bank of all images that are to have masks, in the run's folder."""
        path, source = self._run.path / FILE_NAME, self._data.masks_for
        if self._world.lead(lambda: self._is_there(source, self._maker(net))):
            return
        created = self._world.only(lambda: MaskBank.create(path, source, made_by=self._maker(net)))
        with created or nullcontext() as writer:
            start = len(source) - len(writer.missing()) if writer else 0
            with self._telling("making masks of", len(source), start) as show:
                make_bank(
                    net,
                    source,
                    writer,
                    options=self._config.predict,
                    refine=self._config.refine,
                    threads=self._cores,
                    device=self._device,
                    precision=self._precision,
                    workers=self._workers,
                    prior_size=self._config.labels.size,
                    priors=store if self._data.trained_first else None,
                    show=show,
                    bad=self._bad_images(source).add,
                    world=self._world,
                )

    def sheet(self, photos: Photos, store: PriorStore, net: SaliencyNet) -> None:
        """sheet.png: some of the images trained on, their priors and masks."""
        rows = sheet.evenly(len(photos))
        images, samples = photos.images[rows], photos.indices[rows]
        maps = store.maps[samples].astype(np.float32) / 255
        maps[~store.valid[samples]] = np.nan
        found = predict(
            net,
            images,
            hints(store.maps[samples], store.valid[samples]) if net.hints else None,
            options=self._config.predict,
            refine=self._config.refine,
            device=self._device,
            precision=self._precision,
            threads=self._cores,
        )
        masks = (found > self._config.predict.threshold).cpu().numpy()
        sheet.draw_sheet(self._run.path / "sheet.png", images.permute(0, 2, 3, 1).numpy(), maps, masks, NAMES)

    # Small helpers

    def _is_there(self, source: Source, made_by: str) -> bool:
        """Whether the bank is finished and of these images; one of others is set aside, a broken one made again."""
        path, wanted = self._run.path / FILE_NAME, (source.fingerprint(), made_by)
        if path.exists():
            try:
                bank = MaskBank.open(path)
            except DataError as broken:
                self._console.warn(f"{broken.what} It is made again.")
                return False
            if (bank.fingerprint, bank.made_by) == wanted:
                return True
            aside = _set_aside(path, bank.fingerprint)
            os.replace(path, aside)
            self._console.note(f"The masks of other images are now {aside}.")
        before = _set_aside(path, wanted[0])
        with suppress(DataError):  # made earlier, and set aside since
            bank = MaskBank.open(before)
            if (bank.fingerprint, bank.made_by) == wanted:
                os.replace(before, path)
                return True
        return False

    def _maker(self, net: SaliencyNet) -> str:
        """Tells apart all that would make other masks."""
        weights = hashlib.sha256()
        for tensor in net.state_dict().values():
            weights.update(tensor.contiguous().cpu().numpy().tobytes())
        told: list[Any] = [self._config.predict, self._config.refine]
        told += [f"priors at {self._config.labels.size} px"] if net.hints else []
        return f"{net.arch} at {net.size} px, weights {weights.hexdigest()}, " + ", ".join(map(str, told))

    def _filled(self, name: str, source: Source, size: int) -> PriorStore:
        store = PriorStore.open(self._run.path / name, source, size, self._world)
        with self._telling("making priors of", len(source), int(store.done.sum())) as show:
            store.fill(source, self._workers, lambda done, total: show(done), self._world)
        return store

    def _bad_images(self, source: Source) -> BadImages:
        """Counted for each source; listed once in bad_images.txt."""

        def report(name: str, reason: str) -> None:
            if name not in self._listed:
                self._listed.add(name)
                self._run.add_bad_image(name, reason)

        return BadImages(len(source), self._config.data.max_bad, report)

    @contextmanager
    def _telling(self, what: str, total: int, start: int = 0) -> Iterator[Callable[[int], None]]:
        """A bar for work on ``total`` images, ``start`` of which are done; the block tells how many are."""
        if start == total:
            yield lambda done: None
            return
        self._console.note(f"{what} {total:,} images")
        began = time.perf_counter()
        with self._console.progress(total, start) as bar:

            def show(done: int) -> None:
                speed = (done - start) / max(time.perf_counter() - began, 1e-9)
                bar.update(done, {"images/s": round(speed, 1)})
                self._run.status.beat()

            yield show


def _set_aside(path: Path, fingerprint: str) -> Path:
    """Where the bank at ``path`` lies while the run's bank is one of other images."""
    return path.with_name(SET_ASIDE.format(fingerprint[:8]))


# What is told


def of_priors(store: PriorStore) -> dict[str, Any]:
    """How far priors agree: mean correlation of two maps of an image; and how many maps were left out."""
    matrix = agreement(store.maps, store.valid)
    pairs = {
        f"{NAMES[i]} {NAMES[j]}": float(matrix[i, j])
        for i, j in combinations(range(len(NAMES)), 2)
        if np.isfinite(matrix[i, j])
    }
    return {
        "prior_agreement": {"mean": mean_agreement(matrix), "pairs": pairs},
        "invalid_priors": store.left_out(),
    }


def of_masks(bank: MaskBank) -> dict[str, Any]:
    shares = bank.foreground(np.arange(bank.count))
    return {
        "count": bank.count,
        "foreground": float(shares.mean()),
        "empty": int((shares == 0).sum()),
        "full": int((shares == 1).sum()),
    }


def in_short(row: dict[str, Any]) -> str:
    """A stage on one line, as soon as it is measured."""
    if row["max_f"] is None:
        return f"{row['name']}: no image could be measured"
    return f"{row['name']}: max-F {row['max_f']:.3f}, IoU {row['iou']:.3f}, MAE {row['mae']:.3f}"


def report(results: dict[str, Any], console: Console) -> None:
    """The tables on stderr, from the content of results.json."""
    console.note("")
    if results["stages"]:
        title = f"{results['stages'][-1]['images']} images of {results['eval']}"
        cells = [
            [row["name"], *("-" if row[name] is None else f"{row[name]:.3f}" for name in FIGURES)]
            for row in results["stages"]
        ]
        console.table([title, *TITLES], cells)
        console.note("")
    priors, invalid = results["prior_agreement"], results["invalid_priors"]
    if priors["mean"] is not None:
        pairs = ", ".join(f"{name} {value:.2f}" for name, value in priors["pairs"].items())
        console.note(f"agreement of priors: mean correlation {priors['mean']:.2f} ({pairs})")
    if any(invalid.values()):
        named = ", ".join(f"{name} {count}" for name, count in invalid.items() if count)
        console.note(f"priors left out, with nothing to go by: {named}")
    if results["bad_images"]:
        console.note(f"{results['bad_images']} images cannot be decoded: see bad_images.txt")
    masks = results["masks"]
    console.note(
        f"{masks['count']:,} masks: {masks['foreground']:.1%} foreground on average, "
        f"{masks['empty']:,} empty, {masks['full']:,} full"
    )
    if 2 * (masks["empty"] + masks["full"]) > masks["count"]:
        console.warn("most masks are empty or full, and pretraining uses none of these; look at sheet.png")
