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

from relicctl.bgmask import contact_sheet
from relicctl.bgmask.data import BgmaskData
from relicctl.bgmask.evaluate import METRICS, StageTable, compute_mean_agreement, compute_prior_agreement
from relicctl.bgmask.images import InMemoryImages, load_resized_images
from relicctl.bgmask.network import SaliencyNet
from relicctl.bgmask.predict import predict_saliency, write_mask_bank
from relicctl.bgmask.prior_cache import PriorCache
from relicctl.bgmask.priors.maps import PRIOR_NAMES, build_prior_channels
from relicctl.bgmask.self_training import count_total_steps, run_self_training
from relicctl.config.bgmask import BgmaskConfig
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.core.hardware import count_process_cores
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImages
from relicctl.data.mask_bank import FILE_NAME, OTHER_DATA_FILE_NAME, MaskBank
from relicctl.errors import DataError
from relicctl.runs.distributed import select_progress_metrics
from relicctl.runs.folder import RunFolder

METRIC_TITLES = ("max-F", "F at .5", "MAE", "IoU", "accuracy", "S", "E")  # of FIGURES, in their order


class MaskPipeline:
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
        self._cores = count_process_cores()
        self._workers = config.runtime.workers if config.runtime.workers != "auto" else self._cores
        self._reported_names = run.read_bad_images()

    def load_images(self) -> InMemoryImages:
        """All images to train on, squashed, in memory."""
        source = self._data.train
        with self._show_progress("reading", len(source)) as show:
            size, bad = self._config.labels.size, self._track_bad_images(source)
            return load_resized_images(source, size, workers=self._workers, bad=bad, show=show, world=self._world)

    def compute_priors(self) -> PriorCache:
        """The hand-made maps of the images to train on."""
        return self._fill_prior_cache("priors", self._data.train, self._config.labels.size)

    def evaluate_priors(self) -> StageTable | None:
        """The stages before training, measured, if there are true masks to measure on."""
        truth = self._data.truth
        if truth is None:
            return None
        store = self._fill_prior_cache(
            f"priors-eval-{truth.images.compute_fingerprint()[:8]}", truth.images, self._config.labels.size
        )
        table = StageTable(
            truth,
            store,
            self._config,
            device=self._device,
            precision=self._precision,
            workers=self._workers,
            threads=self._cores,
            on_row=lambda row: self._console.info(format_stage(row)),
            world=self._world,
        )
        table.add_priors()
        return table

    def train(
        self, photos: InMemoryImages, store: PriorCache, table: StageTable | None, resume_command: str
    ) -> SaliencyNet:
        """The rounds and the final network; each is measured when it is done."""
        with self._console.progress(count_total_steps(self._config, len(photos))) as bar:
            return run_self_training(
                self._config,
                photos,
                store,
                self._run,
                device=self._device,
                precision=self._precision,
                show=lambda step, figures: bar.update(step, select_progress_metrics(figures)),
                on_stage_end=lambda name, net: table.add_net(name, net) if table else None,
                warn=self._console.warn,
                resume_command=resume_command,
                world=self._world,
            )

    def make_masks(self, net: SaliencyNet, store: PriorCache) -> None:
        """The bank of all images that are to have masks, in the run's folder."""
        path, source = self._run.path / FILE_NAME, self._data.masks_for
        if self._world.broadcast_from_main(lambda: self._is_bank_finished(source, self._format_provenance(net))):
            return
        opened_writer = self._world.run_on_main(
            lambda: MaskBank.create(path, source, made_by=self._format_provenance(net))
        )
        with opened_writer or nullcontext() as writer:
            start = len(source) - len(writer.find_missing()) if writer else 0
            with self._show_progress("making masks of", len(source), start) as show:
                write_mask_bank(
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
                    priors=store if self._data.masks_for_is_prefix else None,
                    show=show,
                    on_bad_image=self._track_bad_images(source).add,
                    world=self._world,
                )

    def draw_sheet(self, photos: InMemoryImages, store: PriorCache, net: SaliencyNet) -> None:
        """sheet.png: some of the images trained on, their priors and masks."""
        rows = contact_sheet.sample_evenly(len(photos))
        images, samples = photos.images[rows], photos.indices[rows]
        maps = store.maps[samples].astype(np.float32) / 255
        maps[~store.valid[samples]] = np.nan
        predicted = predict_saliency(
            net,
            images,
            build_prior_channels(store.maps[samples], store.valid[samples]) if net.hints else None,
            options=self._config.predict,
            refine=self._config.refine,
            device=self._device,
            precision=self._precision,
            threads=self._cores,
        )
        masks = (predicted > self._config.predict.threshold).cpu().numpy()
        contact_sheet.draw_contact_sheet(
            self._run.path / "sheet.png", images.permute(0, 2, 3, 1).numpy(), maps, masks, PRIOR_NAMES
        )

    # Small helpers

    def _is_bank_finished(self, source: ImageDataset, made_by: str) -> bool:
        """Whether the bank is finished and of these images; one of others is set aside, a broken one made again."""
        path, expected = self._run.path / FILE_NAME, (source.compute_fingerprint(), made_by)
        if path.exists():
            try:
                bank = MaskBank.open(path)
            except DataError as broken:
                self._console.warn(f"{broken.what} It is made again.")
                return False
            if (bank.fingerprint, bank.made_by) == expected:
                return True
            aside = _get_aside_path(path, bank.fingerprint)
            os.replace(path, aside)
            self._console.info(f"The masks of other images are now {aside}.")
        aside_before = _get_aside_path(path, expected[0])
        with suppress(DataError):  # made earlier, and set aside since
            bank = MaskBank.open(aside_before)
            if (bank.fingerprint, bank.made_by) == expected:
                os.replace(aside_before, path)
                return True
        return False

    def _format_provenance(self, net: SaliencyNet) -> str:
        """Tells apart all that would make other masks."""
        weights = hashlib.sha256()
        for tensor in net.state_dict().values():
            weights.update(tensor.contiguous().cpu().numpy().tobytes())
        parts: list[Any] = [self._config.predict, self._config.refine]
        parts += [f"priors at {self._config.labels.size} px"] if net.hints else []
        return f"{net.arch} at {net.size} px, weights {weights.hexdigest()}, " + ", ".join(map(str, parts))

    def _fill_prior_cache(self, name: str, source: ImageDataset, size: int) -> PriorCache:
        store = PriorCache.open(self._run.path / name, source, size, self._world)
        with self._show_progress("making priors of", len(source), int(store.done.sum())) as show:
            store.fill(source, self._workers, lambda done, total: show(done), self._world)
        return store

    def _track_bad_images(self, source: ImageDataset) -> BadImages:
        """Counted for each source; listed once in bad_images.txt."""

        def report_bad_image(name: str, reason: str) -> None:
            if name not in self._reported_names:
                self._reported_names.add(name)
                self._run.add_bad_image(name, reason)

        return BadImages(len(source), self._config.data.max_bad, report_bad_image)

    @contextmanager
    def _show_progress(self, what: str, total: int, start: int = 0) -> Iterator[Callable[[int], None]]:
        """A bar for work on ``total`` images, ``start`` of which are done; the block tells how many are."""
        if start == total:
            yield lambda done: None
            return
        self._console.info(f"{what} {total:,} images")
        began = time.perf_counter()
        with self._console.progress(total, start) as bar:

            def update_bar(done: int) -> None:
                speed = (done - start) / max(time.perf_counter() - began, 1e-9)
                bar.update(done, {"images/s": round(speed, 1)})
                self._run.status.write_heartbeat()

            yield update_bar


def _get_aside_path(path: Path, fingerprint: str) -> Path:
    """Where the bank at ``path`` lies while the run's bank is one of other images."""
    return path.with_name(OTHER_DATA_FILE_NAME.format(fingerprint[:8]))


# What is told


def summarize_priors(store: PriorCache) -> dict[str, Any]:
    """How far priors agree: mean correlation of two maps of an image; and how many maps were left out."""
    matrix = compute_prior_agreement(store.maps, store.valid)
    pairs = {
        f"{PRIOR_NAMES[i]} {PRIOR_NAMES[j]}": float(matrix[i, j])
        for i, j in combinations(range(len(PRIOR_NAMES)), 2)
        if np.isfinite(matrix[i, j])
    }
    return {
        "prior_agreement": {"mean": compute_mean_agreement(matrix), "pairs": pairs},
        "invalid_priors": store.count_invalid(),
    }


def summarize_masks(bank: MaskBank) -> dict[str, Any]:
    shares = bank.get_foreground_ratio(np.arange(bank.count))
    return {
        "count": bank.count,
        "foreground": float(shares.mean()),
        "empty": int((shares == 0).sum()),
        "full": int((shares == 1).sum()),
    }


def format_stage(row: dict[str, Any]) -> str:
    """A stage on one line, as soon as it is measured."""
    if row["max_f"] is None:
        return f"{row['name']}: no image could be measured"
    return f"{row['name']}: max-F {row['max_f']:.3f}, IoU {row['iou']:.3f}, MAE {row['mae']:.3f}"


def report_bgmask(results: dict[str, Any], console: Console) -> None:
    """The tables on stderr, from the content of results.json."""
    console.info("")
    if results["stages"]:
        title = f"{results['stages'][-1]['images']} images of {results['eval']}"
        cells = [
            [row["name"], *("-" if row[name] is None else f"{row[name]:.3f}" for name in METRICS)]
            for row in results["stages"]
        ]
        console.print_table([title, *METRIC_TITLES], cells)
        console.info("")
    priors, invalid = results["prior_agreement"], results["invalid_priors"]
    if priors["mean"] is not None:
        pairs = ", ".join(f"{name} {value:.2f}" for name, value in priors["pairs"].items())
        console.info(f"agreement of priors: mean correlation {priors['mean']:.2f} ({pairs})")
    if any(invalid.values()):
        named = ", ".join(f"{name} {count}" for name, count in invalid.items() if count)
        console.info(f"priors left out, with nothing to go by: {named}")
    if results["bad_images"]:
        console.info(f"{results['bad_images']} images cannot be decoded: see bad_images.txt")
    masks = results["masks"]
    console.info(
        f"{masks['count']:,} masks: {masks['foreground']:.1%} foreground on average, "
        f"{masks['empty']:,} empty, {masks['full']:,} full"
    )
    if 2 * (masks["empty"] + masks["full"]) > masks["count"]:
        console.warn("most masks are empty or full, and pretraining uses none of these; look at sheet.png")
