"""Layers of values: who wins, where a value came from, and what is refused with which words."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from relicctl.config.bgmask import BgmaskConfig
from relicctl.config.pretrain import PretrainConfig
from relicctl.config.resolve import (
    dump_yaml,
    flatten,
    format_allowed_values,
    get_config_fields,
    load_run_config,
    resolve_config,
    resolve_from_run,
)
from relicctl.config.transfer import SegmentationConfig
from relicctl.config.yaml_io import load_mapping, parse_yaml
from relicctl.errors import UsageError


def value(config: PretrainConfig, name: str) -> Any:
    return flatten(config.model_dump())[name]


def refusal(**given: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        resolve_config(**given)
    assert caught.value.code == 2
    assert caught.value.what.endswith(".")
    assert caught.value.fix.endswith((".", "?"))
    return caught.value


# ---------------------------------------------------------------- laws


def test_later_layers_override_earlier_ones_and_origins_are_recorded(tmp_path: Path) -> None:
    """For every subset of the layers, the last one present gives the value and the origin."""
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 2\n")
    layers = [
        ("preset", {"preset": "demo"}, 0, "default"),  # no preset sets a seed
        ("file", {"config_file": file}, 2, f"file {file}"),
        ("set", {"sets": ["seed=3"]}, 3, "--set"),
        ("option", {"options": {"seed": 4}}, 4, "--seed"),
    ]
    for mask in range(16):
        present = [layer for bit, layer in enumerate(layers) if mask >> bit & 1]
        resolved = resolve_config(**{k: v for _, given, _, _ in present for k, v in given.items()})
        expected = (present[-1][2], present[-1][3]) if present else (0, "default")
        assert (resolved.config.seed, resolved.origin["seed"]) == expected


def test_the_last_assignment_wins() -> None:
    assert resolve_config(sets=["loss.beta=1", "loss.beta=2"]).config.loss.beta == 2


def test_every_value_has_an_origin() -> None:
    resolved = resolve_config("demo", sets=["loss.beta=2"], options={"data": "x", "val": None})
    assert list(resolved.origin) == list(get_config_fields())
    assert resolved.origin["loss.beta"] == "--set"
    assert resolved.origin["data.train"] == "--data"
    assert resolved.origin["model.arch"] == "preset demo"
    assert resolved.origin["checkpoint.keep"] == "default"


@given(
    train=st.none() | st.text(max_size=30),
    beta=st.floats(0, 1e30),
    epochs=st.integers(10, 10**12),
    negatives=st.integers(1, 4095) | st.just("all"),
    low=st.floats(1e-9, 0.5),
    origins=st.booleans(),
)
def test_dumped_configs_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    train: str | None, beta: float, epochs: int, negatives: Any, low: float, origins: bool,
) -> None:  # fmt: skip
    config = PretrainConfig(
        data={"train": train},
        loss={"beta": beta, "negatives": negatives},
        optim={"epochs": epochs},
        views={"large": {"area": (low, 1.0)}},
    )  # type: ignore[arg-type]
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    origin = dict.fromkeys(get_config_fields(), "somewhere") if origins else None
    path.write_text(dump_yaml(config, origin), encoding="utf-8", errors="surrogatepass", newline="")
    assert load_run_config(path) == config


# ---------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss.beta=1e-3", 1e-3),
        ("loss.beta=1.5E3", 1500.0),
        ("loss.beta=2", 2.0),
        ("loss.negatives=all", "all"),
        ("optim.max_steps=null", None),
        ("runtime.compile=true", True),
        ("views.large.area=[0.1,1]", (0.1, 1.0)),
        ("data.train=/a=b,c/{1,2}.tar#d", "/a=b,c/{1,2}.tar#d"),
        ("data.train={1..3}.zip", "{1..3}.zip"),
        ("data.train=2024", "2024"),
        ("data.train=null", None),
        (" seed =7", 7),
    ],
)
def test_assignments_are_parsed_as_yaml_values(text: str, expected: Any) -> None:
    assert value(resolve_config(sets=[text]).config, text.partition("=")[0].strip()) == expected


@pytest.mark.parametrize(
    ("text", "suggested"),
    [
        ("loss.negativs=3", "loss.negatives"),
        ("optim.batchsize=3", "optim.batch_size"),
        ("batch_size=3", "optim.batch_size"),
        ("beta=3", "loss.beta"),
        ("model.projector.hiden=3", "model.projector.hidden"),
        ("loss=3", "loss.temperature"),
        ("views.large=3", "views.large.count"),
    ],
)
def test_unknown_keys_name_the_closest(text: str, suggested: str) -> None:
    error = refusal(sets=[text])
    assert text.partition("=")[0] in error.what
    assert suggested in error.fix


def test_a_length_that_a_command_does_not_have_suggests_the_one_it_has() -> None:
    assert refusal(sets=["optim.max_steps=5"], schema=BgmaskConfig).fix.startswith("Did you mean optim.epochs")
    assert "optim.steps" in refusal(sets=["optim.epochs=5"], schema=SegmentationConfig).fix
    assert "optim.max_steps" in refusal(sets=["optim.steps=5"]).fix


def test_an_unknown_key_without_close_names_points_to_the_list() -> None:
    assert "--dry-run" in refusal(sets=["zzzz=1"]).fix


@pytest.mark.parametrize(
    ("text", "shown", "allowed_"),
    [
        ("optim.batch_size=1", "1", "a whole number from 2"),
        ("optim.batch_size=3.5", "3.5", "a whole number from 2"),
        ("loss.negatives=0", "0", "a whole number from 1 or all"),
        ("model.arch=vgg", "vgg", "resnet18, resnet34, resnet50, resnet101, resnet152 or resnet200"),
        ("eval.probe=1", "1", "true or false"),
        ("views.large.area=[0.1,2]", "[0.1, 2]", "a pair [a, b], each a number from 0 up to 1"),
        ("optim.base_lr=[", "'['", "a number above 0"),
        ("loss.temperature=.nan", ".nan", "a number above 0"),
        ("loss.beta=2001-99-99", "'2001-99-99'", "a number from 0"),
    ],
)
def test_wrong_values_name_key_value_and_what_is_allowed(text: str, shown: str, allowed_: str) -> None:
    error = refusal(sets=[text])
    assert error.what == f"{text.partition('=')[0]} cannot be {shown} (from --set)."
    assert error.fix.startswith(f"Give {allowed_}: ")


@pytest.mark.parametrize("name", list(get_config_fields()))
def test_allowed_values_of_every_key_can_be_printed(name: str) -> None:
    assert format_allowed_values(name)


@pytest.mark.parametrize("text", ["loss.beta", "=3", ""])
def test_set_without_an_equals_sign_is_refused(text: str) -> None:
    assert "KEY=VALUE" in refusal(sets=[text]).what


def test_errors_name_the_option_that_set_the_value() -> None:
    assert "--workers" in refusal(options={"workers": -1}).what


# ---------------------------------------------------------------- files


def test_a_file_may_nest_or_dot_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("loss: {beta: 3}\noptim.epochs: 20\nviews:\n  large.count: 3\n")
    config = resolve_config(config_file=file).config
    assert (config.loss.beta, config.optim.epochs, config.views.large.count) == (3, 20, 3)


def test_a_file_may_extend_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("extends: r101-1000ep\nmodel: {width: 2}\n")
    resolved = resolve_config(config_file=file)
    assert (resolved.config.model.arch, resolved.config.model.width) == ("resnet101", 2)
    assert resolved.origin["model.arch"] == "preset r101-1000ep"
    assert resolved.origin["optim.base_lr"] == "preset r50-1000ep"
    assert "--preset" in refusal(preset="demo", config_file=file).fix


def test_the_run_record_in_config_yaml_is_ignored_as_a_setting(tmp_path: Path) -> None:
    config = resolve_config("demo").config
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config) + yaml.safe_dump({"run": {"version": "0", "preset": "demo"}}))
    assert load_run_config(file) == config


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "aliases"),
        ("seed: 1\nseed: 2\n", "twice"),
        ("loss:\n  beta: 1\n  beta: 1\n", "twice"),
        ("seed: [1\n", "line 2"),
        ("- 1\n", "holds no keys"),
        ("1: 2\n", "holds no keys"),
        ("just text", "holds no keys"),
        ("seed: !!python/object/apply:os.getpid []\n", "line 1"),
        ("[" * 5000, "is not YAML"),
        ("seeds: 1\n", "no key 'seeds'"),
        ("loss: 1\n", "group of keys"),
        ("extends: nothing\n", "no preset"),
        ("extends: [demo]\n", "no preset"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert said in refusal(config_file=file).what


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(config_file=tmp_path / "none.yaml").what
    assert "cannot be read" in refusal(config_file=tmp_path).what
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not text" in refusal(config_file=tmp_path / "b.yaml").what


def test_an_empty_config_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_mapping(tmp_path / "c.yaml") == {}
    assert resolve_config(config_file=tmp_path / "c.yaml").config == PretrainConfig()


def test_numbers_with_an_exponent_are_numbers() -> None:
    assert parse_yaml("[1e-3, -2E+4, 1.5e6, 3.e-1]") == [1e-3, -2e4, 1.5e6, 0.3]
    assert parse_yaml("[e-3, 1e, 1e-3x]") == ["e-3", "1e", "1e-3x"]


# ---------------------------------------------------------------- objectives


def test_objective_relic_implies_its_settings_unless_they_are_given(tmp_path: Path) -> None:
    for preset in (None, "cifar10-r18", "r50-2large6small"):
        resolved = resolve_config(preset, sets=["objective=relic"])
        config = resolved.config
        assert (config.views.large.count, config.views.small.count, config.loss.negatives) == (2, 0, "all")
        assert resolved.origin["loss.negatives"] == "objective relic"
    resolve_config(sets=["objective=relic", "views.large.count=2"])
    assert "relic" in refusal(sets=["objective=relic", "views.large.count=4"]).what
    file = tmp_path / "c.yaml"
    file.write_text("loss: {negatives: 5}\n")
    assert "relic" in refusal(config_file=file, sets=["objective=relic"]).what


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        ("byol", "loss.beta=1"),
        ("byol", "loss.temperature=1"),
        ("simclr", "loss.negatives=5"),
        ("simclr", "target.ema=0.9"),
        ("supervised", "model.predictor.out=8"),
        ("supervised", "model.projector.out=8"),
    ],
)
def test_keys_that_the_objective_never_reads_are_refused(objective: str, text: str) -> None:
    error = refusal(sets=[f"objective={objective}", text])
    assert text.partition("=")[0] in error.what
    assert objective in error.what


# ---------------------------------------------------------------- continuing a run


def test_resume_uses_the_runs_config_and_what_the_user_adds(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(resolve_config("demo", sets=["seed=5"]).config) + "run: {version: '0'}\n")
    now = resolve_config("cifar10-r18", sets=["checkpoint.keep=7"], options={"device": "cpu"})
    both = resolve_from_run(now, file)
    assert both.config.seed == 5
    assert both.config.model == resolve_config("demo").config.model
    assert (both.config.checkpoint.keep, both.config.runtime.device) == (7, "cpu")
    assert (both.origin["seed"], both.origin["checkpoint.keep"]) == ("run", "--set")


def test_origins_do_not_depend_on_the_order_of_keys() -> None:
    sets = ["loss.beta=1", "seed=3", "optim.epochs=20"]
    shuffled = random.Random(0).sample(sets, 3)
    assert resolve_config(sets=sets) == resolve_config(sets=shuffled)


def test_an_endless_config_file_is_read_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_bytes(b"#" * (1 << 20))
    for path in (tmp_path / "long.yaml", Path("/dev/zero")):
        with pytest.raises(UsageError, match="KiB"):
            load_mapping(path)


@pytest.fixture
def masked_run(tmp_path: Path) -> Path:
    """The config.yaml of a run whose values contradict the defaults'."""
    sets = ["optim.warmup_epochs=1", "optim.epochs=5", "objective=byol"]
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(resolve_config("demo", sets=sets, options={"bgmask": "masks.bank"}).config))
    return path


@pytest.mark.parametrize(
    "text", ["optim.epochs=3", "bgmask.bank=other.bank", "bgmask.fill=gray", "optim.batch_size=4", "seed=2"]
)
def test_what_is_added_to_a_run_is_checked_against_the_run(masked_run: Path, text: str) -> None:
    key, _, given = text.partition("=")
    resolved = resolve_config(sets=[text], schema=PretrainConfig, run_config=masked_run)
    assert str(value(resolved.config, key)) == given
    assert resolved.origin[key] == "--set"
    others = {name: v for name, v in flatten(resolved.config.model_dump()).items() if name != key}
    before = flatten(load_run_config(masked_run).model_dump())
    assert others == {name: v for name, v in before.items() if name != key}


@pytest.mark.parametrize("text", ["optim.epochs=0", "optim.warmup_epochs=6", "loss.beta=1", "optim.epoch=3"])
def test_what_contradicts_the_run_is_refused(masked_run: Path, text: str) -> None:
    assert text.partition("=")[0] in refusal(sets=[text], run_config=masked_run).what


# ---------------------------------------------------------------- several data sets


@pytest.mark.parametrize("given", [("a",), ["a"], "a"])
def test_one_data_set_is_text_however_it_is_given(given: Any) -> None:
    config = resolve_config(options={"data": given}).config
    assert config.data.train == "a"
    assert "\n  train: a\n" in dump_yaml(config)


def test_several_data_sets_are_a_list(tmp_path: Path) -> None:
    path = tmp_path / "several.yaml"
    path.write_text(dump_yaml(resolve_config(options={"data": ("a", "b,{1,2}.tar"), "val": ["c", "d"]}).config))
    for config in (
        resolve_config(config_file=path).config,
        resolve_config(sets=["data.train=[a, 'b,{1,2}.tar']", "data.val=[c, d]"]).config,
    ):
        assert (config.data.train, config.data.val) == (("a", "b,{1,2}.tar"), ("c", "d"))
    assert resolve_config(options={"data": ()}).config.data.train is None
    assert "data.train cannot be" in refusal(sets=["data.train=[1, 2]"]).what
