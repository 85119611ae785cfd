"""`relicctl presets`."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

import pytest

from relicctl.commands.presets import copy, listing, show
from relicctl.config.presets import preset_names, preset_text
from relicctl.config.resolve import leaves, resolve
from relicctl.errors import UsageError


def test_ls_is_a_line_per_preset() -> None:
    lines = listing().splitlines()
    assert sorted(line.split()[0] for line in lines) == preset_names()
    assert all(line.endswith(".") for line in lines)
    commands = [re.split("  +", line)[1] for line in lines]
    assert commands[0] == "pretrain"
    assert len(set(commands)) == len(list(groupby(commands)))
    assert commands[[line.startswith("coco-detection ") for line in lines].index(True)] == "transfer --task detection"


def test_show_is_a_config_with_an_origin_for_every_value(tmp_path: Path) -> None:
    text = show("r101-1000ep")
    assert text.count("# from ") == len(leaves())
    assert "arch: resnet101" in text
    assert "# from preset r101-1000ep" in text
    assert "# from preset r50-1000ep" in text
    file = tmp_path / "shown.yaml"
    file.write_text(text)
    assert resolve(config_file=file).config == resolve("r101-1000ep").config


def test_cp_copies_to_a_file_or_into_a_folder(tmp_path: Path) -> None:
    assert copy("demo", tmp_path / "mine.yaml") == tmp_path / "mine.yaml"
    assert copy("demo", tmp_path) == tmp_path / "demo.yaml"
    assert (tmp_path / "mine.yaml").read_text() == (tmp_path / "demo.yaml").read_text() == preset_text("demo")


@pytest.mark.parametrize("name", preset_names())
def test_a_copy_is_the_same_experiment(name: str, tmp_path: Path) -> None:
    assert resolve(config_file=copy(name, tmp_path)).config == resolve(name).config


def test_cp_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("mine")
    for destination in (tmp_path, tmp_path / "demo.yaml"):
        with pytest.raises(UsageError, match="exists"):
            copy("demo", destination)
    assert (tmp_path / "demo.yaml").read_text() == "mine"


def test_cp_into_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        copy("demo", tmp_path / "no" / "such" / "folder.yaml")
