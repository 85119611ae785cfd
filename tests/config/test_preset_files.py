"""The presets that ship: each resolves, and says what it is, how to run it and what is known of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from relicctl.config import presets
from relicctl.config.presets import find_preset, list_presets, read_preset, read_preset_header
from relicctl.config.resolve import resolve_config
from relicctl.errors import UsageError

NAMES = {
    "demo", "cifar10-r18", "imagenette-r18", "stl10-r18", "r50-1000ep", "r50-300ep", "r50-100ep",
    "r50-100ep-1gpu", "r50-2large6small", "r50x2-1000ep", "r50x4-1000ep", "r101-1000ep", "r152-1000ep",
    "r200-1000ep", "r200x2-1000ep", "linear-imagenet", "byol-suite", "finetune-byol", "finetune-quick",
    "demo-bgmask", "resnet-bgmask", "u2netp", "u2net", "voc-segmentation", "voc-detection", "coco-detection",
    "segmentation-quick", "detection-quick", "semi-1pct", "semi-10pct",
}  # fmt: skip


def test_every_preset_of_the_list_exists() -> None:
    assert set(list_presets()) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_preset_resolves_and_has_a_header(name: str) -> None:
    resolved = resolve_config(name)
    assert resolved.preset == name
    assert f"preset {name}" in resolved.origin.values()
    first, *rest = read_preset_header(name).splitlines()
    assert first.endswith(".")
    assert f"--preset {name} " in " ".join(rest) + " "
    for part in ("Hardware: ", "Time: ", "Result: "):
        assert any(line.startswith(part) for line in rest), part
    assert max(map(len, read_preset(name).splitlines())) <= 110


def test_imagenet_presets_differ_as_their_names_say() -> None:
    base = resolve_config("r50-1000ep").config
    for name, arch, width in [
        ("r50x2-1000ep", "resnet50", 2),
        ("r50x4-1000ep", "resnet50", 4),
        ("r101-1000ep", "resnet101", 1),
        ("r152-1000ep", "resnet152", 1),
        ("r200-1000ep", "resnet200", 1),
        ("r200x2-1000ep", "resnet200", 2),
    ]:
        model = base.model.model_copy(update={"arch": arch, "width": width})
        assert resolve_config(name).config == base.model_copy(update={"model": model})
    short = resolve_config("r50-100ep").config
    swav = resolve_config("r50-2large6small").config
    assert (swav.views.large.count, swav.views.small.count) == (2, 6)
    assert swav.optim == short.optim


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "base_lr", "decay", "ema"),
    [
        ("r50-1000ep", 1000, 4096, 0.2, 1.5e-6, 0.996),
        ("r50-300ep", 300, 4096, 0.3, 1.5e-6, 0.99),
        ("r50-100ep", 100, 4096, 0.45, 1e-6, 0.99),
        ("r50-100ep-1gpu", 100, 512, 0.4, 1e-6, 0.9995),
    ],
)
def test_schedules_by_length_follow_byol(
    name: str, epochs: int, batch: int, base_lr: float, decay: float, ema: float
) -> None:
    config = resolve_config(name).config
    optim = config.optim
    assert (optim.epochs, optim.batch_size, optim.base_lr, optim.weight_decay, config.target.ema) == (
        epochs, batch, base_lr, decay, ema,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("dem", "demo"),
        ("r50", "r50-1"),
        ("qqqq", "presets ls"),
        ("my.yaml", "--config my.yaml"),
        ("../demo", "demo"),
    ],
)
def test_unknown_preset_names_suggest_the_closest(name: str, advice: str) -> None:
    with pytest.raises(UsageError) as refused:
        find_preset(name)
    assert advice in refused.value.fix


def test_presets_inside_the_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an installed wheel, where the folder lies in the package and no checkout surrounds it."""
    package = tmp_path / "site-packages" / "relicctl"
    (package / "config").mkdir(parents=True)
    shutil.copytree(find_preset("demo").parent, package / "presets")
    monkeypatch.setattr(presets, "__file__", str(package / "config" / "presets.py"))
    presets._find_presets_folder.cache_clear()
    try:
        assert find_preset("demo").parent == package / "presets"
        assert set(list_presets()) == NAMES
    finally:
        presets._find_presets_folder.cache_clear()
