"""How well a classifier does: figures, tables for people, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relicctl.console import Console
from relicctl.core.checkpoint import write_atomically
from relicctl.evaluation.sweep import SweepResult

MAX_NAMED_CLASSES = 30  # most classes whose names stand on an axis or all in a table
MAX_CONFUSION_CLASSES = 12  # most whose confusion is told in numbers
NUM_WORST_CLASSES = 10


@dataclass(frozen=True)
class ClassificationMetrics:
    """``confusion``: int64 ``[C, C]``, how many images of class (row) were told to be class (column)."""

    top1: float
    top5: float
    confusion: np.ndarray

    @classmethod
    def from_logits(cls, logits: Tensor, labels: Tensor) -> ClassificationMetrics:
        """Logits ``[N, C]``, labels int64 ``[N]``. With fewer than five classes the fifth guess is the last."""
        classes = logits.shape[1]
        guesses = logits.topk(min(5, classes), dim=1).indices
        right = guesses == labels[:, None]
        pairs = torch.bincount(labels * classes + guesses[:, 0], minlength=classes**2)
        return cls(
            right[:, 0].double().mean().item(),
            right.any(1).double().mean().item(),
            pairs.view(classes, classes).cpu().numpy(),
        )

    @property
    def class_counts(self) -> np.ndarray:
        """int64 ``[C]``: how many there were of each class."""
        return self.confusion.sum(1)

    @property
    def class_accuracy(self) -> np.ndarray:
        """float64 ``[C]``: the share of each class told rightly; NaN where it has no image."""
        with np.errstate(invalid="ignore"):
            return self.confusion.diagonal() / self.class_counts

    @property
    def mean_per_class(self) -> float:
        return float(np.nanmean(self.class_accuracy))

    def to_dict(self) -> dict[str, float]:
        return {"top1": self.top1, "top5": self.top5, "mean_per_class": self.mean_per_class}

    def get_class_metrics(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Per class: its images, and the share told rightly (None without images)."""
        rows = zip(names, self.class_counts.tolist(), self.class_accuracy.tolist(), strict=True)
        return {name: {"images": count, "top1": share if count else None} for name, count, share in rows}


def print_linear_results(results: dict[str, Any], console: Console) -> None:
    """The tables on stderr, from the content of results.json."""
    named = (("top-1", "top1"), ("top-5", "top5"), ("mean per class", "mean_per_class"))
    rows = [[name, results[key]] for name, key in (*named, ("kNN(20)", "knn20"), ("kNN(200)", "knn200"))]
    console.print_table([f"accuracy on {results['protocol']['test_images']} images", ""], rows)
    sweep = results["sweep"]
    if sweep is not None:
        console.info("")
        rates = zip(sweep["rates"], sweep["held_out_top1"], strict=True)
        console.print_table(
            ["rate per 256", "held-out top-1", ""],
            [[rate, value, "chosen" if rate == sweep["rate"] else ""] for rate, value in rates],
        )
    present = [(name, row) for name, row in results["per_class"].items() if row["images"]]
    title = "class"
    if len(present) > MAX_NAMED_CLASSES:
        present, title = (
            sorted(present, key=lambda item: item[1]["top1"])[:NUM_WORST_CLASSES],
            f"{NUM_WORST_CLASSES} worst classes",
        )
    console.info("")
    console.print_table([title, "images", "top-1"], [[name, row["images"], row["top1"]] for name, row in present])
    if len(results["per_class"]) <= MAX_CONFUSION_CLASSES:
        console.info("")
        console.print_table(
            ["class \\ told to be", *(_truncate_name(name) for name in results["per_class"])],
            [[name, *row] for name, row in zip(results["per_class"], results["confusion"], strict=True)],
        )
    if results["tests"]:
        console.info("")
        console.print_table(
            ["further test set", "images", "top-1", "top-5", "mean per class", "missing classes"],
            [
                [name, t["images"], t["top1"], t["top5"], t["mean_per_class"], len(t["missing_classes"])]
                for name, t in results["tests"].items()
            ],
        )


def plot_linear_results(
    path: Path, scores: ClassificationMetrics, names: Sequence[str], choice: SweepResult | None, title: str
) -> None:
    """PNG: the confusion matrix, and beside it the sweep if there was one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 1 if choice is None else 2
    figure = Figure(figsize=(7.5 * panels, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    matrix, *others = figure.subplots(1, panels, squeeze=False)[0]
    with np.errstate(invalid="ignore"):
        percent = 100 * scores.confusion / scores.class_counts[:, None]
    image = matrix.imshow(percent, vmin=0, vmax=100, cmap="Blues", interpolation="nearest")
    figure.colorbar(image, ax=matrix, label="% of the class's images", shrink=0.8)
    matrix.set(title="confusion matrix", xlabel="told to be", ylabel="class")
    if len(names) <= MAX_NAMED_CLASSES:
        ticks = range(len(names))
        matrix.set_xticks(ticks, [_truncate_name(name) for name in names], rotation=90)
        matrix.set_yticks(ticks, [_truncate_name(name) for name in names])
    if len(names) <= MAX_CONFUSION_CLASSES:
        for (row, column), share in np.ndenumerate(percent):
            if share >= 0.5:
                colour = "white" if share > 50 else "black"
                matrix.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8)
    for axes in others:
        assert choice is not None
        axes.plot(
            *zip(*sorted(zip(choice.rates, choice.accuracy, strict=True)), strict=True),
            marker=".",
            color="tab:blue",
            label="held-out training images",
        )
        axes.axvline(choice.best_rate, color="tab:orange", linestyle="--", label=f"chosen: {choice.best_rate:g}")
        axes.set(xscale="log", xlabel="learning rate per 256 images", ylabel="top-1", title="sweep")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))


def _truncate_name(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"
