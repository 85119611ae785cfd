"""Keys that were renamed before 0.1: old runs, files and command lines are still read, and old results found."""

from __future__ import annotations

from typing import Any

from relicctl.config import yaml_io
from relicctl.errors import UsageError


def _rename(old_section: str, new_section: str | None = None, /, **names: str) -> dict[str, str]:
    """Return the table of a section's keys, given as ``old="new"``."""
    return {f"{old_section}.{old}": f"{new_section or old_section}.{new}" for old, new in names.items()}


# Old key -> new key of each command; where the values were renamed too, (new key, {old value: new value}).
_DATA: dict[str, Any] = _rename("data", max_bad="max_corrupt_fraction")
_TEST = _rename("eval", crop_ratio="crop_pct")
_HELD_OUT = _rename("eval", holdout="val_fraction")
_CROP = {"area": "scale", "aspect": "ratio", "flip": "hflip_prob"}
_DENSE = {
    **_DATA,
    **_rename("data", sets="datasets"),
    **_rename("model", frozen="freeze_encoder"),
    "model.norm": ("model.freeze_bn", {"batch": False, "frozen": True}),
    **_rename("optim", drops="milestones"),
}
RENAMED: dict[str, dict[str, Any]] = {
    "pretrain": {
        **_DATA,
        **_TEST,
        **_HELD_OUT,
        **_rename("views", aspect="ratio"),
        **_rename("views.photometric", "views.augment", flip="hflip_prob", jitter="color_jitter_prob"),
        **_rename("views.photometric", "views.augment", brightness="brightness", contrast="contrast"),
        **_rename("views.photometric", "views.augment", saturation="saturation", hue="hue"),
        **_rename("views.photometric", "views.augment", grayscale="grayscale_prob", blur="blur_prob"),
        **_rename("views.photometric", "views.augment", solarize="solarize_prob"),
        **_rename("bgmask", limits="foreground_range"),
        **_rename("eval", train_samples="knn_train_images", val_samples="val_images"),
    },
    "train-bgmask": {
        **_DATA,
        **_rename("model", priors="prior_channels", encoder="init_encoder"),
        **_rename("labels", drop="drop_fraction", agreement="uncertainty_weight"),
        **_rename("refine", cut="grabcut_weight", background="bg_threshold", foreground="fg_threshold"),
        **_rename("refine", keep="label_momentum"),
        **_rename("rounds", "self_training", count="rounds", epochs="epochs"),
        **_rename("loss", f="fbeta", beta2="fbeta_beta2"),
        **_rename("augment", **_CROP, jitter="color_jitter_prob", grayscale="grayscale_prob", blur="blur_prob"),
        **_rename("data", masks_for="mask_data", images="max_train_images", eval_images="max_eval_images"),
    },
    "linear-eval": {
        **_DATA,
        **_TEST,
        **_HELD_OUT,
        **_rename("crop", **_CROP),
        **_rename("sweep", rates="lrs", holdout="val_fraction"),
    },
    "transfer": {
        **_DATA,
        **_TEST,
        **_rename("data", sets="datasets", holdout="val_fraction", draw="samples_per_class"),
        **_rename("logistic", lambdas="l2"),
        **_rename("knn", ks="k"),
        **_rename("finetune", rates="lrs", decays="weight_decays", **_CROP),
    },
    "transfer --task segmentation": {**_DENSE, **_rename("crop", flip="hflip_prob")},
    "transfer --task detection": {
        **_DENSE,
        **_rename("images", short="min_size", long="max_size", flip="hflip_prob"),
        **_rename("head", proposals_train="rpn_post_nms_top_n_train", proposals_test="rpn_post_nms_top_n_test"),
        **_rename("head", regions="box_batch_size_per_image"),
    },
}
RENAMED_METRICS = {"rank_me": "rankme", "deviation": "embedding_std", "feature_deviation": "feature_std"}


def rename_key(command: str, name: str) -> str:
    """Return the present name of a dotted key of ``command``."""
    new = RENAMED[command].get(name, name)
    return new if isinstance(new, str) else new[0]


def rename_value(command: str, name: str, value: Any) -> Any:
    """Return the present form of a value that was given under the old name ``name``. UsageError if it was none."""
    new = RENAMED[command][name]
    if isinstance(new, str):
        return value
    new_name, values = new
    if not isinstance(value, str) or value not in values:
        present = " or ".join(f"{yaml_io.dump_value(after)} for {before}" for before, after in values.items())
        what = f"{name} cannot be {yaml_io.dump_value(value)[:80]}."
        raise UsageError(what, f"It is {new_name} now: give {present}.")
    return values[value]


def rename_metrics(record: dict[str, Any]) -> dict[str, Any]:
    """Return a line of metrics.jsonl under the present names."""
    return {RENAMED_METRICS.get(name, name): value for name, value in record.items()}


def restore_old_names(command: str, content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``content``, dumped from the section ``prefix`` ("finetune.") of a config, under the oldest names.

    Cells and mask banks are found again by hashes and texts of this form, so it stays as it is, order included.
    """
    restored = {}
    for name, value in content.items():
        if isinstance(value, dict):
            restored[name] = restore_old_names(command, value, f"{prefix}{name}.")
            continue
        for old, new in RENAMED[command].items():
            if rename_key(command, old) == prefix + name:
                name = old.rpartition(".")[2]
                if not isinstance(new, str):
                    value = next(before for before, after in new[1].items() if after == value)
                break
        restored[name] = value
    return restored
