"""The picture of a run: loss, accuracy, collapse figures and schedules over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relicctl.core.checkpoint import atomically

PANELS = (
    ("objective", ("loss", "nll", "kl")),
    ("held-out accuracy", ("knn20", "knn200", "probe_top1")),
    ("collapse monitor", ("rank_me", "entropy", "deviation")),
    ("learning rate", ("lr",)),
)


def draw_curves(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """One panel per group of figures, written to ``path`` as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, keys) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for key in keys:
            points = [(record["step"], record[key]) for record in records if key in record]
            if points:
                axes.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 30 else None)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.suptitle(title)
    atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
