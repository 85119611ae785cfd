"""Plots: matplotlib figures saved whole or not at all, and curves.png of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from relicctl.config.renamed import rename_metrics
from relicctl.core.atomic_io import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# title, metrics on the left axis, metrics on the right axis
PANELS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("objective", ("loss", "nll", "kl"), ()),
    ("held-out accuracy", ("knn20", "knn200", "probe_top1"), ()),
    ("collapse monitor", ("rankme",), ("entropy", "embedding_std", "feature_std")),
    ("schedules", ("lr",), ("ema",)),
)


def plot_curves(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw one panel per group of metrics, as PNG."""
    figure = new_figure(11, 7)
    records = [rename_metrics(record) for record in records]
    for axes, (name, left, right) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        axes.set_title(name, loc="left", fontsize="medium")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        lines = _plot_lines(axes, records, left, 0)
        if any(key in record for key in right for record in records):
            other = axes.twinx()
            lines += _plot_lines(other, records, right, len(left))
            other.set_ylabel(", ".join(right))
            axes.set_ylabel(", ".join(left))
        if lines:  # the legend stands beside the title, where it hides no curve
            axes.legend(
                handles=lines, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=len(lines) if len(lines) < 4 else 2,
                frameon=False, fontsize="small", handlelength=1, columnspacing=1,
            )  # fmt: skip
    figure.suptitle(title)
    save_figure(path, figure)


def _plot_lines(axes: Any, records: list[dict[str, Any]], keys: tuple[str, ...], first_colour: int) -> list[Any]:
    lines = []
    for number, key in enumerate(keys):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            style: dict[str, Any] = {"label": key, "color": f"C{first_colour + number}"}
            if len(points) < 30:
                style["marker"] = "."
            if key == "loss":  # so that its parts stay visible on top
                style |= {"linewidth": 4, "alpha": 0.4}
            lines += axes.plot(*zip(*points, strict=True), **style)
    return lines


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """Return a figure of so many inches; ``options`` are matplotlib's own, by default with constrained layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported late: it takes half a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), **{"layout": "constrained", **options})
    FigureCanvasAgg(figure)
    return figure


def save_figure(path: Path, figure: Figure, dpi: float = 110) -> None:
    """Write ``figure`` to ``path`` as PNG."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))
