"""The schema: what a config can hold and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from relicctl.config.pretrain import PretrainConfig
from relicctl.config.resolve import flatten, get_config_fields
from relicctl.errors import UsageError

# The names that pipelines rely on.
CONTRACT = {
    "": ["objective", "seed"],
    "model.": ["arch", "width", "stem", "padding", "projector.hidden", "projector.out"],
    "model.predictor.": ["hidden", "out"],
    "views.large.": ["count", "size", "area"],
    "views.small.": ["count", "size", "area"],
    "loss.": ["temperature", "alpha", "beta", "negatives", "invariance"],
    "target.": ["ema"],
    "bgmask.": ["probability", "fill", "source"],
    "optim.": [
        "name",
        "batch_size",
        "base_lr",
        "weight_decay",
        "warmup_epochs",
        "epochs",
        "max_steps",
        "microbatch",
    ],
    "data.": ["cache", "subset"],
    "eval.": ["every_epochs"],
    "checkpoint.": ["every_steps", "every_minutes", "keep"],
    "runtime.": ["device", "workers", "compile", "precision"],
}


def test_the_documented_keys_exist() -> None:
    promised = {section + name for section, names in CONTRACT.items() for name in names}
    assert promised - set(get_config_fields()) == set()


def test_every_key_has_a_description() -> None:
    assert [name for name, field in get_config_fields().items() if not field.description] == []


def test_listed_keys_are_all_leaves_of_the_schema() -> None:
    assert list(get_config_fields()) == list(flatten(PretrainConfig().model_dump()))


def test_a_config_is_immutable() -> None:
    with pytest.raises(ValidationError):
        PretrainConfig().optim.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "content",
    [
        {"seed": True},
        {"seed": 1.0},
        {"seed": "1"},
        {"seed": -1},
        {"model": {"width": "1"}},
        {"model": {"width": 0.3}},
        {"model": {"width": 0.0}},
        {"model": {"arch": "resnet51"}},
        {"eval": {"probe": 1}},
        {"loss": {"negatives": 0}},
        {"loss": {"negatives": "some"}},
        {"loss": {"temperature": 0}},
        {"loss": {"beta": float("nan")}},
        {"loss": {"alpha": float("inf")}},
        {"optim": {"batch_size": 1}},
        {"optim": {"max_steps": 0}},
        {"views": {"large": {"count": 0}}},
        {"views": {"large": {"area": [0.1]}}},
        {"views": {"large": {"area": [0.1, 1.1]}}},
        {"views": {"small": {"count": -1}}},
        {"runtime": {"workers": "many"}},
        {"data": {"train": 3}},
        {"nothing": 1},
        {"loss": {"nothing": 1}},
    ],
)
def test_wrong_types_ranges_and_names_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PretrainConfig(**content)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"optim": {"batch_size": 10}}, "loss.negatives"),
        ({"views": {"large": {"area": [0.5, 0.4]}}}, "views.large.area"),
        ({"views": {"small": {"area": [0.0, 0.4]}}}, "views.small.area"),
        ({"views": {"ratio": [2, 1]}}, "views.ratio"),
        ({"objective": "relic"}, "relic"),
        ({"objective": "byol", "views": {"large": {"count": 1}, "small": {"count": 0}}}, "byol"),
        ({"objective": "simclr", "views": {"large": {"count": 1}, "small": {"count": 0}}}, "simclr"),
        ({"optim": {"epochs": 9}}, "optim.warmup_epochs"),
        ({"optim": {"microbatch": 1000}}, "optim.microbatch"),
        ({"bgmask": {"source": "bank"}}, "bgmask.source"),
    ],
)
def test_contradicting_keys_are_refused(content: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as refused:
        PretrainConfig(**content)
    assert named in refused.value.what


def test_only_sampled_negatives_need_a_batch() -> None:
    PretrainConfig(**{"optim": {"batch_size": 2}, "loss": {"negatives": "all"}})
    PretrainConfig(**{"optim": {"batch_size": 2}, "objective": "byol"})
    PretrainConfig(**{"optim": {"batch_size": 11}})
