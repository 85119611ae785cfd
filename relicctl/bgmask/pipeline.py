"""The steps of ``train-bgmask``: each saves its result in the run's folder, and loads it from there when resumed.

The ranks of a run take every step together.
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

from relicctl.bgmask import contact_sheet
from relicctl.bgmask.data import BgmaskData
from relicctl.bgmask.evaluate import METRICS, StageTable, compute_prior_agreement
from relicctl.bgmask.images import InMemoryImages, load_resized_images
from relicctl.bgmask.network import SaliencyNet
from relicctl.bgmask.predict import MaskSource, SaliencyPredictor, write_mask_bank
from relicctl.bgmask.prior_cache import PriorCache
from relicctl.bgmask.priors.maps import PRIOR_NAMES
from relicctl.bgmask.self_training import run_self_training
from relicctl.config.bgmask import BgmaskConfig
from relicctl.config.renamed import restore_old_names
from relicctl.console import Console
from relicctl.core.hardware import count_process_cores
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImages
from relicctl.data.mask_bank import FILE_NAME, OTHER_DATA_FILE_NAME, MaskBank, MaskBankWriter
from relicctl.errors import DataError
from relicctl.runs.distributed import RunContext

METRIC_TITLES = ("max-F", "F at .5", "MAE", "IoU", "accuracy", "S", "E")  # of METRICS, in their order


class MaskPipeline:
    """The work of one run, step by step in the order of the methods."""

    def __init__(self, config: BgmaskConfig, data: BgmaskData, context: RunContext) -> None:
        self._config, self._data, self._context = config, data, context
        self._workers = count_process_cores() if config.runtime.workers == "auto" else config.runtime.workers
        self._listed_bad_images = context.run.read_bad_images()

    def load_images(self) -> InMemoryImages:
        """Load all training images into memory, resized to squares."""
        source, size = self._data.train, self._config.labels.size
        bad, world = self._track_bad_images(source), self._context.world
        with self._show_progress("reading", len(source)) as show:
            return load_resized_images(source, size, workers=self._workers, bad=bad, show=show, world=world)

    def compute_priors(self) -> PriorCache:
        """Compute the handcrafted prior maps of the training images."""
        return self._fill_prior_cache("priors", self._data.train)

    def evaluate_priors(self) -> StageTable | None:
        """Measure the stages before training, if there are true masks to measure on."""
        truth = self._data.truth
        if truth is None:
            return None
        priors = self._fill_prior_cache(f"priors-eval-{truth.images.compute_fingerprint()[:8]}", truth.images)
        table = StageTable(truth, priors, self._config, self._context, self._workers)
        table.add_priors()
        return table

    def train(
        self, images: InMemoryImages, priors: PriorCache, table: StageTable | None, resume_command: str
    ) -> SaliencyNet:
        """Train the rounds and the final network; each is measured when it is finished."""
        on_stage_end = table.add_net if table else lambda name, net: None
        return run_self_training(
            self._config, images, priors, self._context, resume_command=resume_command, on_stage_end=on_stage_end
        )

    def make_masks(self, net: SaliencyNet, priors: PriorCache) -> None:
        """Write the bank of all images that get masks to the run's folder."""
        path, source, context = self._context.run.path / FILE_NAME, self._data.masks_for, self._context
        if context.world.broadcast_from_main(lambda: self._is_bank_finished(source, self._format_provenance(net))):
            return
        opened = context.world.run_on_main(lambda: MaskBankWriter(path, source, made_by=self._format_provenance(net)))
        cached_priors = priors if self._data.masks_for_is_prefix else None
        mask_source = MaskSource(source, self._workers, self._config.labels.size, cached_priors)
        predictor, bad = SaliencyPredictor.from_config(net, self._config, context), self._track_bad_images(source)
        with opened or nullcontext() as writer:
            start = len(source) - len(writer.find_missing()) if writer else 0
            with self._show_progress("making masks of", len(source), start) as show:
                write_mask_bank(predictor, mask_source, writer, context.world, show=show, on_bad_image=bad.add)

    def draw_sheet(self, images: InMemoryImages, priors: PriorCache, net: SaliencyNet) -> None:
        """Draw sheet.png: some of the training images, their priors and masks."""
        rows = contact_sheet.sample_evenly(len(images))
        shown, indices = images.images[rows], images.indices[rows]
        predictor = SaliencyPredictor.from_config(net, self._config, self._context)
        masks = (predictor.predict_with_cache(shown, priors, indices) > self._config.predict.threshold).numpy()
        path, pixels = self._context.run.path / "sheet.png", shown.permute(0, 2, 3, 1).numpy()
        contact_sheet.draw_contact_sheet(path, pixels, priors.load_floats(indices), masks, PRIOR_NAMES)

    def _is_bank_finished(self, source: ImageDataset, made_by: str) -> bool:
        """Return whether the run has the finished bank of these images.

        A bank of other images is set aside, and comes back when its images are asked for again.
        """
        path, expected = self._context.run.path / FILE_NAME, (source.compute_fingerprint(), made_by)
        if path.exists():
            try:
                bank = MaskBank.open(path)
            except DataError as broken:
                self._context.console.warn(f"{broken.what} It is computed again.")
                return False
            if (bank.fingerprint, bank.made_by) == expected:
                return True
            aside = _get_aside_path(path, bank.fingerprint)
            os.replace(path, aside)
            self._context.console.info(f"The masks of other images were moved to {aside}.")
        aside_before = _get_aside_path(path, expected[0])
        with suppress(DataError):
            bank = MaskBank.open(aside_before)
            if (bank.fingerprint, bank.made_by) == expected:
                os.replace(aside_before, path)
                return True
        return False

    def _format_provenance(self, net: SaliencyNet) -> str:
        """Return a text that differs wherever the masks would: it is saved in the bank."""
        weights = hashlib.sha256()
        for tensor in net.state_dict().values():
            weights.update(tensor.contiguous().cpu().numpy().tobytes())
        parts = [format_section(self._config, name) for name in ("predict", "refine")]
        parts += [f"priors at {self._config.labels.size} px"] if net.hints else []
        return f"{net.arch} at {net.size} px, weights {weights.hexdigest()}, " + ", ".join(parts)

    def _fill_prior_cache(self, name: str, source: ImageDataset) -> PriorCache:
        world = self._context.world
        priors = PriorCache.open(self._context.run.path / name, source, self._config.labels.size, world)
        with self._show_progress("computing priors of", len(source), int(priors.done.sum())) as show:
            priors.fill(source, self._workers, show, world)
        return priors

    def _track_bad_images(self, source: ImageDataset) -> BadImages:
        """Count bad images for each source; list each once in bad_images.txt."""

        def report_bad_image(name: str, reason: str) -> None:
            if name not in self._listed_bad_images:
                self._listed_bad_images.add(name)
                self._context.run.add_bad_image(name, reason)

        limit, listed_in = self._config.data.max_corrupt_fraction, str(self._context.run.bad_images_path)
        return BadImages(len(source), limit, report_bad_image, listed_in)

    @contextmanager
    def _show_progress(self, what: str, total: int, start: int = 0) -> Iterator[Callable[[int], None]]:
        """Show progress over ``total`` images, ``start`` of which are done; yield what takes the number done."""
        if start == total:
            yield lambda done: None
            return
        self._context.console.info(f"{what} {total:,} images")
        began = time.perf_counter()
        with self._context.console.progress(total, start) as bar:

            def update_bar(done: int) -> None:
                speed = (done - start) / max(time.perf_counter() - began, 1e-9)
                bar.update(done, {"images/s": round(speed, 1)})
                self._context.run.status.write_heartbeat()

            yield update_bar


def format_section(config: BgmaskConfig, name: str) -> str:
    """Return the keys of a section and their values on one line, as mask banks record them."""
    section = restore_old_names("train-bgmask", getattr(config, name).model_dump(), f"{name}.")
    return " ".join(f"{key}={value!r}" for key, value in section.items())


def summarize_priors(priors: PriorCache) -> dict[str, Any]:
    """Return the mean correlation of two priors' maps of an image, and how many maps are invalid."""
    matrix = compute_prior_agreement(priors.maps, priors.valid)
    pairs = {
        f"{PRIOR_NAMES[i]} {PRIOR_NAMES[j]}": float(matrix[i, j])
        for i, j in combinations(range(len(PRIOR_NAMES)), 2)
        if np.isfinite(matrix[i, j])
    }
    mean = float(np.mean(list(pairs.values()))) if pairs else None
    return {"prior_agreement": {"mean": mean, "pairs": pairs}, "invalid_priors": priors.count_invalid()}


def summarize_masks(bank: MaskBank) -> dict[str, Any]:
    """Return the number of masks, their mean foreground fraction, and how many are empty or full."""
    foreground = bank.get_foreground_ratio(np.arange(bank.count))
    return {
        "count": bank.count,
        "foreground": float(foreground.mean()),
        "empty": int((foreground == 0).sum()),
        "full": int((foreground == 1).sum()),
    }


def report_bgmask(results: dict[str, Any], console: Console) -> None:
    """Print the content of results.json as tables on stderr."""
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
        counts = ", ".join(f"{name} {count}" for name, count in invalid.items() if count)
        console.info(f"invalid priors, of images without contrast, left out: {counts}")
    if results["bad_images"]:
        console.info(f"{results['bad_images']} images cannot be decoded: see bad_images.txt")
    masks = results["masks"]
    console.info(
        f"{masks['count']:,} masks: {masks['foreground']:.1%} foreground on average, "
        f"{masks['empty']:,} empty, {masks['full']:,} full"
    )
    if 2 * (masks["empty"] + masks["full"]) > masks["count"]:
        console.warn("most masks are empty or full, and pretraining uses none of these; see sheet.png")


def _get_aside_path(path: Path, fingerprint: str) -> Path:
    """Return where the bank at ``path`` is moved while the run's bank is one of other images."""
    return path.with_name(OTHER_DATA_FILE_NAME.format(fingerprint[:8]))
