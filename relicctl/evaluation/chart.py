"""The transfer table for people: on a terminal, as Markdown, and the bar chart of relative improvement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from relicctl.core.checkpoint import write_atomically

Cell = dict[str, Any]

MAX_COLUMNS = 3  # panels side by side


def build_transfer_table(
    cells: Sequence[Cell], encoders: Sequence[str], baselines: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: data, protocol, labels, metric; each encoder's %; each one's relative improvement in %."""
    names = shorten_encoder_names(encoders)
    others = [e for e in encoders if e not in baselines]
    header = ["data", "protocol", "labels", "metric", *(f"{names[e]} %" for e in encoders)]
    header += [f"{names[e]} vs {names[b]}" for b in baselines for e in others]
    rows = []
    for key, values in group_cells(cells).items():
        shown = [f"{100 * values[e]:.1f}" for e in encoders]
        shown += [format_percent(compute_relative_improvement(values[e], values[b])) for b in baselines for e in others]
        rows.append([*key, *shown])
    return header, rows


def group_cells(cells: Iterable[Cell]) -> dict[tuple[str, str, str, str], dict[str, float]]:
    """Values by encoder, for each (data, protocol, labels, metric)."""
    groups: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for cell in cells:
        key = cell["data"], cell["protocol"], cell["labels"], cell["metric"]
        groups.setdefault(key, {})[cell["encoder"]] = cell["value"]
    return groups


def compute_relative_improvement(value: float, baseline: float) -> float | None:
    """(value - baseline) / baseline in %; None over a baseline of 0."""
    return 100 * (value - baseline) / baseline if baseline else None


def list_relative_improvements(cells: Sequence[Cell], encoders: Sequence[str], baselines: Sequence[str]) -> list[Cell]:
    return [
        dict(zip(("data", "protocol", "labels", "metric"), key, strict=True))
        | {
            "encoder": e,
            "baseline": b,
            "relative_improvement_percent": compute_relative_improvement(values[e], values[b]),
        }
        for key, values in group_cells(cells).items()
        for b in baselines
        for e in encoders
        if e not in baselines
    ]


def format_percent(percent: float | None) -> str:
    return "" if percent is None else f"{percent:+.1f} %"


def format_markdown(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    lines = [header, ["---"] * 4 + ["---:"] * (len(header) - 4), *rows]
    text = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    return text + "".join(f"\n- {note}" for note in notes) + "\n"


def plot_transfer_chart(path: Path, cells: Sequence[Cell], encoders: Sequence[str], baselines: Sequence[str]) -> None:
    """PNG: bars of relative improvement over each baseline, or of the values themselves where there is none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups, names = group_cells(cells), shorten_encoder_names(encoders)
    kinds = list(dict.fromkeys((protocol, labels) for _, protocol, labels, _ in groups))
    bars = [e for e in encoders if e not in baselines] if baselines else list(encoders)
    panels = [(baseline, kind) for baseline in (baselines or [""]) for kind in kinds]
    columns = len(kinds) if len(kinds) <= MAX_COLUMNS else MAX_COLUMNS
    rows = -(-len(panels) // columns)
    most = max(sum(key[1:3] == kind for key in groups) for kind in kinds)
    figure = Figure(figsize=(max(5.0, 1.5 + most * (0.5 + 0.35 * len(bars))) * columns, 3.8 * rows + 0.6))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (baseline, kind) in zip(grid, panels, strict=False):
        here = {key: values for key, values in groups.items() if key[1:3] == kind}
        for number, encoder in enumerate(bars):
            heights = [
                (compute_relative_improvement(values[encoder], values[baseline]) or 0.0)
                if baseline
                else 100 * values[encoder]
                for values in here.values()
            ]
            width = 0.8 / len(bars)
            places = [place + (number - (len(bars) - 1) / 2) * width for place in range(len(here))]
            drawn = axes.bar(places, heights, width * 0.92, label=names[encoder], color=f"C{number}")
            axes.bar_label(drawn, fmt="%+.1f" if baseline else "%.1f", fontsize=8, padding=2)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.margins(x=0.05, y=0.15)
        axes.set_xticks(range(len(here)), [f"{data}\n{metric}" for data, _, _, metric in here])
        axes.set_title(f"{kind[0]}, {kind[1]} labels")
        axes.set_ylabel(f"improvement over\n{names[baseline]}, % of its value" if baseline else "%")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    handles, texts = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=min(4, len(bars)))
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def shorten_encoder_names(encoders: Sequence[str]) -> dict[str, str]:
    """The last parts of paths, as many as tell them apart."""
    for parts in range(1, 10):
        short = [_keep_last_parts(e, parts) for e in encoders]
        if len(set(short)) == len(short):
            break
    return dict(zip(encoders, short, strict=True))


def _keep_last_parts(encoder: str, parts: int) -> str:
    kind, colon, rest = encoder.rpartition(":")
    return kind + colon + "/".join(rest.rstrip("/").removesuffix("/encoder.safetensors").split("/")[-parts:])
