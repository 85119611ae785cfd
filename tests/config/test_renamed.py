"""Old names of keys: read from files, --set and runs, with one warning; what was hashed under them is found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from relicctl.bgmask.pipeline import format_section
from relicctl.cli import run as relicctl
from relicctl.config.bgmask import BgmaskConfig
from relicctl.config.pretrain import PretrainConfig
from relicctl.config.renamed import RENAMED, RENAMED_METRICS, rename_metrics, restore_old_names
from relicctl.config.resolve import (
    SCHEMAS,
    dump_yaml,
    flatten,
    get_config_fields,
    resolve_config,
    resolve_from_run,
)
from relicctl.config.transfer import DetectionConfig, SegmentationConfig, TransferConfig
from relicctl.errors import UsageError
from relicctl.evaluation.transfer import compute_digest


def old_file(path: Path, command: str) -> tuple[Path, Any]:
    """The defaults of ``command`` as they were written under the old names, and the config that they are."""
    config = SCHEMAS[command]()
    new = flatten(config.model_dump(mode="json"), schema=SCHEMAS[command])
    tree: dict[str, Any] = {"command": command}
    for old, name in RENAMED[command].items():
        if isinstance(name, tuple):
            name, values = name
            new[name] = {after: before for before, after in values.items()}[new[name]]
        *sections, leaf = old.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = new[name]
    path.write_text(yaml.safe_dump(tree))
    return path, config


@pytest.mark.parametrize("command", SCHEMAS)
def test_renamed_keys_lead_to_existing_keys(command: str) -> None:
    fields = get_config_fields(SCHEMAS[command])
    for old, new in RENAMED[command].items():
        assert old not in fields
        assert (new if isinstance(new, str) else new[0]) in fields


@pytest.mark.parametrize("command", SCHEMAS)
def test_a_file_with_old_names_is_the_same_config(command: str, tmp_path: Path) -> None:
    path, config = old_file(tmp_path / "old.yaml", command)
    resolved = resolve_config(config_file=path, schema=SCHEMAS[command])
    assert resolved.config == config
    assert resolved.renamed.keys() == RENAMED[command].keys()
    assert resolve_from_run(resolve_config(schema=SCHEMAS[command]), path).config == config
    assert not resolve_from_run(resolve_config(schema=SCHEMAS[command]), path).renamed  # the run's, not the user's


@pytest.mark.parametrize(
    ("command", "text", "key", "value"),
    [
        ("pretrain", "views.photometric.blur=[0.5, 0.2]", "views.augment.blur_prob", (0.5, 0.2)),
        ("train-bgmask", "model.encoder=1e3", "model.init_encoder", "1e3"),  # of text, as it stands
        ("transfer", "data.sets={a: b}", "data.datasets", {"a": "b"}),
        ("transfer --task detection", "model.norm=batch", "model.freeze_bn", False),
        ("transfer --task segmentation", "model.norm=frozen", "model.freeze_bn", True),
    ],
)
def test_set_takes_old_names(command: str, text: str, key: str, value: Any) -> None:
    schema = SCHEMAS[command]
    more = ["model.arch=resnet"] if command == "train-bgmask" else []
    resolved = resolve_config(sets=[*more, text], schema=schema)
    assert flatten(resolved.config.model_dump(), schema=schema)[key] == value
    assert resolved.origin[key] == "--set"
    assert resolved.renamed == {text.partition("=")[0]: key}


def test_old_names_are_warned_of_once_and_not_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("eval: {holdout: 0.1}\n")
    arguments = ["pretrain", "--preset=demo", "--dry-run", f"--config={file}", "--set", "views.aspect=[0.5,2]"]
    assert relicctl(arguments) == 0
    out, err = capsys.readouterr()
    assert "views.ratio" not in err.replace("views.aspect -> views.ratio", "")
    assert err.count("new names") == 1
    assert "eval.holdout -> eval.val_fraction" in err
    assert "holdout" not in out


def test_resuming_an_old_run_does_not_warn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    text = dump_yaml(resolve_config("demo").config).replace("  val_fraction:", "  holdout:")
    (run / "config.yaml").write_text(text + "run: {data_fingerprint: x, precision: fp32, preset: demo}\n")
    assert "holdout" in text
    assert relicctl(["pretrain", "--resume", str(run), "--dry-run"]) == 0
    assert "new names" not in capsys.readouterr().err


# ------------------------------------------------------------ names that are bytes; the values were computed at 0f54cd9

CHANGED = (
    "logistic.l2=[0.1,2]", "knn.k=[3]", "finetune.lrs=[0.5]", "finetune.weight_decays=[0.01]",
    "finetune.scale=[0.2,0.9]", "finetune.hflip_prob=0.25",
)  # fmt: skip


@pytest.mark.parametrize(
    ("protocol", "sets", "digest"),
    [
        ("logistic", (), "97e7d8836e21b134abb1511a"),
        ("knn", (), "8aaea89edfeeba460aa30c48"),
        ("finetune", (), "27e60a16156ee5f0250ccbfd"),
        ("logistic", CHANGED, "ce35a4aef5908d08271eb503"),
        ("knn", CHANGED, "fbd6eeb9acabd6553f00c401"),
        ("finetune", CHANGED, "493412dbb599af9d0e27f57d"),
    ],
)
def test_finished_transfer_cells_are_found_under_the_hash_they_had(
    protocol: str, sets: tuple[str, ...], digest: str
) -> None:
    section = getattr(resolve_config(sets=sets, schema=TransferConfig).config, protocol).model_dump()
    assert digest_of(restore_old_names("transfer", section, f"{protocol}.")) == digest


@pytest.mark.parametrize(
    ("schema", "sets", "digest"),
    [
        (SegmentationConfig, (), "5ff0af400963959a66e1823c"),
        (
            SegmentationConfig,
            ("model.freeze_encoder=true", "model.freeze_bn=true", "optim.milestones=[0.5]", "crop.hflip_prob=0.1"),
            "b8f56ee8cfac8d578583d46f",
        ),
        (DetectionConfig, (), "fc4330aaa13e3eb303a0f216"),
        (
            DetectionConfig,
            ("model.freeze_bn=false", "images.min_size=[64]", "images.max_size=96", "head.rpn_post_nms_top_n_train=20",
             "head.box_batch_size_per_image=8", "images.hflip_prob=0"),
            "54f1e020adbe775e30cbd182",
        ),
    ],
)  # fmt: skip
def test_finished_dense_cells_are_found_under_the_hash_they_had(
    schema: Any, sets: tuple[str, ...], digest: str
) -> None:
    content = resolve_config(sets=sets, schema=schema).config.model_dump(exclude={"runtime", "checkpoint", "data"})
    command = next(name for name, known in SCHEMAS.items() if known is schema)
    assert digest_of(restore_old_names(command, content)) == digest


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        (
            (),
            "flip=True scales=(1.0,) refine='cut' threshold=0.5 batch_size=32, "
            "radius=8 eps=0.001 cut=1.0 background=0.2 foreground=0.9 keep=0.7",
        ),
        (
            ("refine.grabcut_weight=0.5", "refine.bg_threshold=0.1", "refine.label_momentum=0.25",
             "predict.scales=[0.5, 1]", "predict.refine=none"),
            "flip=True scales=(0.5, 1.0) refine='none' threshold=0.5 batch_size=32, "
            "radius=8 eps=0.001 cut=0.5 background=0.1 foreground=0.9 keep=0.25",
        ),
    ],
)  # fmt: skip
def test_mask_banks_of_old_runs_are_recognised(sets: tuple[str, ...], text: str) -> None:
    config = resolve_config(sets=sets, schema=BgmaskConfig).config
    assert ", ".join(format_section(config, name) for name in ("predict", "refine")) == text


def digest_of(part: Any) -> str:
    """As ``compute_digest``, of one thing: the JSON of a cell's parts is a list, and this is one of them."""
    import hashlib
    import json

    assert compute_digest(part) == hashlib.sha256(json.dumps([part]).encode()).hexdigest()[:24]
    return hashlib.sha256(json.dumps(part).encode()).hexdigest()[:24]


# ------------------------------------------------------------ metrics, and the table of tools/golden.py


def test_metrics_of_old_runs_are_read_under_the_present_names() -> None:
    line = {"step": 1, "rank_me": 2.0, "deviation": 0.5, "feature_deviation": 0.4, "loss": 1.0}
    assert rename_metrics(line) == {"step": 1, "rankme": 2.0, "embedding_std": 0.5, "feature_std": 0.4, "loss": 1.0}
    assert rename_metrics(rename_metrics(line)) == rename_metrics(line)


def test_the_table_of_tools_golden_is_the_same() -> None:
    table = yaml.safe_load((Path(__file__).parents[2] / "tools" / "renamed_keys.yaml").read_text("utf-8"))
    plain = {
        command: {old: new if isinstance(new, str) else {"key": new[0], "values": new[1]} for old, new in keys.items()}
        for command, keys in RENAMED.items()
    }
    assert table["config"] == plain
    assert table["metrics"] == RENAMED_METRICS


def test_a_key_given_under_both_names_is_refused():
    with pytest.raises(UsageError) as refused:
        resolve_config(sets=["views.augment.hflip_prob=0.3", "views.photometric.flip=0.1"], schema=PretrainConfig)
    assert "two names of one key" in refused.value.what
    assert refused.value.fix == "Keep views.augment.hflip_prob alone."


@pytest.mark.parametrize(
    ("mistyped", "meant"), [("eval.holdot", "eval.val_fraction"), ("data.max_bed", "data.max_corrupt_fraction")]
)
def test_a_mistyped_old_name_suggests_the_present_one(mistyped, meant):
    with pytest.raises(UsageError) as refused:
        resolve_config(sets=[f"{mistyped}=0.3"], schema=PretrainConfig)
    assert meant in refused.value.fix


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        ("transfer --task detection", "model.norm=frozn", "model.norm cannot be frozn"),
        ("transfer --task detection", "model.norm=true", "model.norm cannot be true"),
        (
            "pretrain",
            "data.max_bad=7",
            "cannot be 7 (from --set, given there as data.max_bad)",
        ),
        ("pretrain", "data.max_corrupt_fraction=7", "data.max_corrupt_fraction cannot be 7 (from --set)"),
    ],
)
def test_a_wrong_value_of_an_old_name_is_told_with_both_names(command, text, said):
    with pytest.raises(UsageError) as caught:
        resolve_config(sets=[text], schema=SCHEMAS[command])
    assert said in caught.value.what
    if "norm" in text:
        assert caught.value.fix == "It is model.freeze_bn now: give false for batch or true for frozen."
