"""Keys that were renamed before 0.1: old runs, files and command lines are still read, and old results found."""

from __future__ import annotations

from typing import Any

# Old key -> new key of each command; where the values were renamed too, (new key, {old value: new value}).
_DATA: dict[str, Any] = {"data.max_bad": "data.max_corrupt_fraction"}
_TEST = {"eval.crop_ratio": "eval.crop_pct"}
_HELD_OUT = {"eval.holdout": "eval.val_fraction"}
_DENSE = {
    **_DATA,
    "data.sets": "data.datasets",
    "model.frozen": "model.freeze_encoder",
    "model.norm": ("model.freeze_bn", {"batch": False, "frozen": True}),
    "optim.drops": "optim.milestones",
}
RENAMED: dict[str, dict[str, Any]] = {
    "pretrain": {
        **_DATA,
        **_TEST,
        **_HELD_OUT,
        "views.aspect": "views.ratio",
        "views.photometric.flip": "views.augment.hflip_prob",
        "views.photometric.jitter": "views.augment.color_jitter_prob",
        "views.photometric.brightness": "views.augment.brightness",
        "views.photometric.contrast": "views.augment.contrast",
        "views.photometric.saturation": "views.augment.saturation",
        "views.photometric.hue": "views.augment.hue",
        "views.photometric.grayscale": "views.augment.grayscale_prob",
        "views.photometric.blur": "views.augment.blur_prob",
        "views.photometric.solarize": "views.augment.solarize_prob",
        "bgmask.limits": "bgmask.foreground_range",
        "eval.train_samples": "eval.knn_train_images",
        "eval.val_samples": "eval.val_images",
    },
    "train-bgmask": {
        **_DATA,
        "model.priors": "model.prior_channels",
        "model.encoder": "model.init_encoder",
        "labels.drop": "labels.drop_fraction",
        "labels.agreement": "labels.uncertainty_weight",
        "refine.cut": "refine.grabcut_weight",
        "refine.background": "refine.bg_threshold",
        "refine.foreground": "refine.fg_threshold",
        "refine.keep": "refine.label_momentum",
        "rounds.count": "self_training.rounds",
        "rounds.epochs": "self_training.epochs",
        "loss.f": "loss.fbeta",
        "loss.beta2": "loss.fbeta_beta2",
        "augment.area": "augment.scale",
        "augment.aspect": "augment.ratio",
        "augment.flip": "augment.hflip_prob",
        "augment.jitter": "augment.color_jitter_prob",
        "augment.grayscale": "augment.grayscale_prob",
        "augment.blur": "augment.blur_prob",
        "data.masks_for": "data.mask_data",
        "data.images": "data.max_train_images",
        "data.eval_images": "data.max_eval_images",
    },
    "linear-eval": {
        **_DATA,
        **_TEST,
        **_HELD_OUT,
        "crop.area": "crop.scale",
        "crop.aspect": "crop.ratio",
        "crop.flip": "crop.hflip_prob",
        "sweep.rates": "sweep.lrs",
        "sweep.holdout": "sweep.val_fraction",
    },
    "transfer": {
        **_DATA,
        **_TEST,
        "data.sets": "data.datasets",
        "data.holdout": "data.val_fraction",
        "data.draw": "data.samples_per_class",
        "logistic.lambdas": "logistic.l2",
        "knn.ks": "knn.k",
        "finetune.rates": "finetune.lrs",
        "finetune.decays": "finetune.weight_decays",
        "finetune.area": "finetune.scale",
        "finetune.aspect": "finetune.ratio",
        "finetune.flip": "finetune.hflip_prob",
    },
    "transfer --task segmentation": {**_DENSE, "crop.flip": "crop.hflip_prob"},
    "transfer --task detection": {
        **_DENSE,
        "images.short": "images.min_size",
        "images.long": "images.max_size",
        "images.flip": "images.hflip_prob",
        "head.proposals_train": "head.rpn_post_nms_top_n_train",
        "head.proposals_test": "head.rpn_post_nms_top_n_test",
        "head.regions": "head.box_batch_size_per_image",
    },
}
RENAMED_METRICS = {"rank_me": "rankme", "deviation": "embedding_std", "feature_deviation": "feature_std"}


def rename_key(command: str, name: str) -> str:
    """Return the present name of a dotted key of ``command``."""
    new = RENAMED[command].get(name, name)
    return new if isinstance(new, str) else new[0]


def rename_value(command: str, name: str, value: Any) -> Any:
    """Return the present form of a value that was given under the name ``name``."""
    new = RENAMED[command].get(name, name)
    return value if isinstance(new, str) or not isinstance(value, str) else new[1].get(value, value)


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
