"""`relicctl presets`."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

import pytest

from relicctl.commands.presets import copy_preset, format_preset, format_preset_list
from relicctl.config.presets import list_presets, read_preset
from relicctl.config.resolve import get_config_fields, resolve_config
from relicctl.errors import UsageError


def test_ls_is_a_line_per_preset() -> None:
    lines = format_preset_list().splitlines()
    assert sorted(line.split()[0] for line in lines) == list_presets()
    assert all(line.endswith(".") for line in lines)
    commands = [re.split("  +", line)[1] for line in lines]
    assert commands[0] == "pretrain"
    assert len(set(commands)) == len(list(groupby(commands)))
    assert commands[[line.startswith("coco-detection ") for line in lines].index(True)] == "transfer --task detection"


def test_show_is_a_config_with_an_origin_for_every_value(tmp_path: Path) -> None:
    text = format_preset("r101-1000ep")
    assert text.count("# from ") == len(get_config_fields())
    assert "arch: resnet101" in text
    assert "# from preset r101-1000ep" in text
    assert "# from preset r50-1000ep" in text
    file = tmp_path / "shown.yaml"
    file.write_text(text)
    assert resolve_config(config_file=file).config == resolve_config("r101-1000ep").config


def test_cp_copies_to_a_file_or_into_a_folder(tmp_path: Path) -> None:
    assert copy_preset("demo", tmp_path / "mine.yaml") == tmp_path / "mine.yaml"
    assert copy_preset("demo", tmp_path) == tmp_path / "demo.yaml"
    assert (tmp_path / "mine.yaml").read_text() == (tmp_path / "demo.yaml").read_text() == read_preset("demo")


@pytest.mark.parametrize("name", list_presets())
def test_a_copy_is_the_same_experiment(name: str, tmp_path: Path) -> None:
    assert resolve_config(config_file=copy_preset(name, tmp_path)).config == resolve_config(name).config


def test_cp_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("mine")
    for destination in (tmp_path, tmp_path / "demo.yaml"):
        with pytest.raises(UsageError, match="exists"):
            copy_preset("demo", destination)
    assert (tmp_path / "demo.yaml").read_text() == "mine"


def test_cp_into_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        copy_preset("demo", tmp_path / "no" / "such" / "folder.yaml")
