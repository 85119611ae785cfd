"""The one writer of matplotlib figures: no display is needed, and a file is whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from relicctl.core.atomic_io import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
