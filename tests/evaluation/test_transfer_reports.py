"""The table and the chart of a comparison."""

from __future__ import annotations

import pytest

from relicctl.evaluation import reports

CELLS = [
    {"encoder": e, "data": d, "protocol": "knn", "labels": "all", "metric": "top1", "value": v}
    for e, d, v in [("runs/a", "x", 0.6), ("runs/b", "x", 0.4), ("runs/a", "y", 0.5), ("runs/b", "y", 0.0)]
]


def test_improvement_is_relative_to_the_baseline():
    header, rows = reports.build_transfer_table(CELLS, ["runs/a", "runs/b"], ["runs/b"])
    assert header == ["data", "protocol", "labels", "metric", "a %", "b %", "a vs b"]
    assert rows == [
        ["x", "knn", "all", "top1", "60.0", "40.0", "+50.0 %"],
        ["y", "knn", "all", "top1", "50.0", "0.0", ""],
    ]
    found = reports.list_relative_improvements(CELLS, ["runs/a", "runs/b"], ["runs/b"])
    assert [cell["encoder"] for cell in found] == ["runs/a", "runs/a"]
    assert found[1]["relative_improvement_percent"] is None


def test_names_are_as_long_as_tells_them_apart():
    names = reports.shorten_encoder_names(
        ["x/one/encoder.safetensors", "y/one", "random:y/one", "torchvision:resnet50"]
    )
    assert list(names.values()) == ["x/one", "y/one", "random:y/one", "torchvision:resnet50"]


def test_the_markdown_is_a_table():
    text = reports.format_markdown(*reports.build_transfer_table(CELLS, ["runs/a", "runs/b"], []), ["a|b"])
    lines = text.splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[-1] == "- a|b"


def test_a_chart_is_drawn_with_and_without_baseline(tmp_path):
    for number, baselines in enumerate(([], ["runs/b"])):
        reports.plot_transfer_chart(tmp_path / f"{number}.png", CELLS, ["runs/a", "runs/b"], baselines)
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("noise", [0.0, 1e-17, 2e-16])
def test_equal_encoders_are_drawn_on_an_axis_of_percents(noise, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(reports, "save_figure", lambda path, figure: drawn.append(figure))
    cells = [cell | {"value": 0.4 + noise * (cell["encoder"] == "runs/a")} for cell in CELLS]
    reports.plot_transfer_chart(tmp_path / "c.png", cells, ["runs/a", "runs/b"], ["runs/b"])
    reports.plot_transfer_chart(tmp_path / "c.png", [c | {"value": noise} for c in cells], ["runs/a", "runs/b"], [])
    assert [figure.axes[0].get_ylim() for figure in drawn] == [(-1, 1), (0, 1)]
    reports.plot_transfer_chart(tmp_path / "c.png", CELLS, ["runs/a", "runs/b"], ["runs/b"])
    assert drawn[-1].axes[0].get_ylim()[1] > 50
