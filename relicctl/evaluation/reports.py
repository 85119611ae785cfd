"""Tables and charts: of a comparison (terminal, Markdown, bars of relative improvement) and of a linear evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relicctl.console import Console
from relicctl.evaluation.cells import Cell
from relicctl.evaluation.linear import SweepResult
from relicctl.evaluation.metrics import ClassificationMetrics
from relicctl.runs.plots import new_figure, save_figure

MAX_COLUMNS = 3  # panels side by side
MAX_NAMED_CLASSES = 30  # most classes that are named on an axis, or listed in a table
MAX_CONFUSION_CLASSES = 12  # most classes whose confusion is shown in numbers
NUM_WORST_CLASSES = 10


def build_transfer_table(
    cells: Sequence[Cell], encoders: Sequence[str], baselines: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: data, protocol, labels, metric, each encoder's %, and relative improvements in %."""
    names = shorten_encoder_names(encoders)
    others = [e for e in encoders if e not in baselines]
    header = ["data", "protocol", "labels", "metric", *(f"{names[e]} %" for e in encoders)]
    header += [f"{names[e]} vs {names[b]}" for b in baselines for e in others]
    rows = []
    for key, values in group_cells(cells).items():
        relative = [compute_relative_improvement(values[e], values[b]) for b in baselines for e in others]
        percents = ["" if percent is None else f"{percent:+.1f} %" for percent in relative]
        rows.append([*key, *(f"{100 * values[e]:.1f}" for e in encoders), *percents])
    return header, rows


def group_cells(cells: Iterable[Cell]) -> dict[tuple[str, str, str, str], dict[str, float]]:
    """Return values by encoder, for each (data, protocol, labels, metric)."""
    groups: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for cell in cells:
        key = cell["data"], cell["protocol"], cell["labels"], cell["metric"]
        groups.setdefault(key, {})[cell["encoder"]] = cell["value"]
    return groups


def compute_relative_improvement(value: float, baseline: float) -> float | None:
    """Return (value - baseline) / baseline in %; None over a baseline of 0."""
    return 100 * (value - baseline) / baseline if baseline else None


def list_relative_improvements(cells: Sequence[Cell], encoders: Sequence[str], baselines: Sequence[str]) -> list[Cell]:
    names = ("data", "protocol", "labels", "metric", "encoder", "baseline", "relative_improvement_percent")
    return [
        dict(zip(names, (*key, e, b, compute_relative_improvement(values[e], values[b])), strict=True))
        for key, values in group_cells(cells).items()
        for b in baselines
        for e in encoders
        if e not in baselines
    ]


def format_markdown(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    lines = [header, ["---"] * 4 + ["---:"] * (len(header) - 4), *rows]
    text = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    return text + "".join(f"\n- {note}" for note in notes) + "\n"


def plot_transfer_chart(path: Path, cells: Sequence[Cell], encoders: Sequence[str], baselines: Sequence[str]) -> None:
    """Plot bars of the relative improvement over each baseline; without baselines, of the values."""
    groups, names = group_cells(cells), shorten_encoder_names(encoders)
    kinds = list(dict.fromkeys((protocol, labels) for _, protocol, labels, _ in groups))
    bars = [e for e in encoders if e not in baselines] if baselines else list(encoders)
    panels = [(baseline, kind) for baseline in (baselines or [""]) for kind in kinds]
    columns = len(kinds) if len(kinds) <= MAX_COLUMNS else MAX_COLUMNS
    rows = -(-len(panels) // columns)
    most = max(sum(key[1:3] == kind for key in groups) for kind in kinds)
    figure = new_figure(max(5.0, 1.5 + most * (0.5 + 0.35 * len(bars))) * columns, 3.8 * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (baseline, kind) in zip(grid, panels, strict=False):
        here, drawn_heights = {key: values for key, values in groups.items() if key[1:3] == kind}, []
        for number, encoder in enumerate(bars):
            heights = [100 * values[encoder] for values in here.values()]
            if baseline:
                heights = [compute_relative_improvement(v[encoder], v[baseline]) or 0.0 for v in here.values()]
            width = 0.8 / len(bars)
            places = [place + (number - (len(bars) - 1) / 2) * width for place in range(len(here))]
            drawn_heights += heights
            drawn = axes.bar(places, heights, width * 0.92, label=names[encoder], color=f"C{number}")
            axes.bar_label(drawn, fmt="%+.1f" if baseline else "%.1f", fontsize=8, padding=2)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.margins(x=0.05, y=0.15)
        if not any(round(height, 1) for height in drawn_heights):  # else the axis would magnify rounding errors
            axes.set_ylim(-1 if baseline else 0, 1)
        axes.set_xticks(range(len(here)), [f"{data}\n{metric}" for data, _, _, metric in here])
        axes.set_title(f"{kind[0]}, {kind[1]} labels")
        axes.set_ylabel(f"improvement over\n{names[baseline]}, % of its value" if baseline else "%")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    handles, texts = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=min(4, len(bars)))
    save_figure(path, figure)


def shorten_encoder_names(encoders: Sequence[str]) -> dict[str, str]:
    """Return the last parts of the paths, as many as distinguish them."""
    for parts in range(1, 10):
        short = [_keep_last_parts(e, parts) for e in encoders]
        if len(set(short)) == len(short):
            break
    return dict(zip(encoders, short, strict=True))


def _keep_last_parts(encoder: str, parts: int) -> str:
    kind, colon, rest = encoder.rpartition(":")
    return kind + colon + "/".join(rest.rstrip("/").removesuffix("/encoder.safetensors").split("/")[-parts:])


def print_linear_results(results: dict[str, Any], console: Console) -> None:
    """Print the tables on stderr, from the content of results.json."""
    named = (("top-1", "top1"), ("top-5", "top5"), ("mean per class", "mean_per_class"))
    rows = [[name, results[key]] for name, key in (*named, ("kNN(20)", "knn20"), ("kNN(200)", "knn200"))]
    protocol = results["protocol"]
    title = f"accuracy of {results['encoder']['source']} on {protocol['test']}, {protocol['test_images']} images"
    accuracy, tables = ([title, ""], rows), []
    if sweep := results["sweep"]:
        rates = zip(sweep["rates"], sweep["held_out_top1"], strict=True)
        rows = [[f"{rate:.3g}", f"{value:.3f}", "chosen" if rate == sweep["rate"] else ""] for rate, value in rates]
        tables.append((["learning rate per 256", "held-out top-1", ""], rows))
    present = [(name, row) for name, row in results["per_class"].items() if row["images"]]
    title = "class"
    if len(present) > MAX_NAMED_CLASSES:
        present = sorted(present, key=lambda item: item[1]["top1"])[:NUM_WORST_CLASSES]
        title = f"{NUM_WORST_CLASSES} worst classes"
    tables.append(([title, "images", "top-1"], [[name, row["images"], row["top1"]] for name, row in present]))
    if len(results["per_class"]) <= MAX_CONFUSION_CLASSES:
        rows = [[name, *row] for name, row in zip(results["per_class"], results["confusion"], strict=True)]
        tables.append((["true \\ predicted", *map(_truncate_name, results["per_class"])], rows))
    if results["tests"]:
        header = ["further test set", "images", *(name for name, _ in named), "missing classes"]
        keys = ("images", *(key for _, key in named))
        rows = [[n, *(t[k] for k in keys), len(t["missing_classes"])] for n, t in results["tests"].items()]
        tables.append((header, rows))
    for number, (header, rows) in enumerate([*tables, accuracy]):  # the accuracy last, where a terminal shows it
        if number:
            console.info("")
        console.print_table(header, rows)


def plot_linear_results(
    path: Path, scores: ClassificationMetrics, names: Sequence[str], sweep: SweepResult | None, title: str
) -> None:
    """Plot the confusion matrix, and beside it the learning rate sweep if there was one."""
    panels = 1 if sweep is None else 2
    figure = new_figure(7.5 * panels, 6.5)
    matrix, *others = figure.subplots(1, panels, squeeze=False)[0]
    with np.errstate(invalid="ignore"):
        percent = 100 * scores.confusion / scores.class_counts[:, None]
    image = matrix.imshow(percent, vmin=0, vmax=100, cmap="Blues", interpolation="nearest")
    figure.colorbar(image, ax=matrix, label="% of the class's images", shrink=0.8)
    matrix.set(title="confusion matrix", xlabel="predicted class", ylabel="true class")
    if len(names) <= MAX_NAMED_CLASSES:
        ticks = range(len(names))
        matrix.set_xticks(ticks, [_truncate_name(name) for name in names], rotation=90)
        matrix.set_yticks(ticks, [_truncate_name(name) for name in names])
    if len(names) <= MAX_CONFUSION_CLASSES:
        for (row, column), value in np.ndenumerate(percent):
            if value >= 0.5:
                colour = "white" if value > 50 else "black"
                matrix.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    for axes in others:
        assert sweep is not None
        points = zip(*sorted(zip(sweep.rates, sweep.accuracy, strict=True)), strict=True)
        axes.plot(*points, marker=".", color="tab:blue", label="held-out training images")
        axes.axvline(sweep.best_rate, color="tab:orange", linestyle="--", label=f"chosen: {sweep.best_rate:g}")
        axes.set(xscale="log", xlabel="learning rate per 256 images", ylabel="top-1", title="sweep")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    save_figure(path, figure, dpi=100)


def _truncate_name(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"
