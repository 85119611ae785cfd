"""Command lines that are refused: their exit code and what they say."""

from __future__ import annotations

from golden_lib.cases import CPU, TINY, Case, make_word_case, sets
from golden_lib.inputs import SHAPES

RUN = "runs/pretrain-relicv2"


def list_error_cases() -> list[Case]:
    """Refusals by what is wrong, and one run that diverges."""
    needs = ["pretrain-relicv2"]
    return [
        make_word_case("errors-usage", list_usage_errors()),
        make_word_case("errors-config", list_config_errors()),
        make_word_case("errors-data", list_data_errors()),
        make_word_case("errors-runs", list_run_errors(), needs=needs),
        make_word_case("errors-bgmask", list_bgmask_errors(), needs=[*needs, "bgmask-u2netp"]),
        make_word_case("errors-linear-eval", list_linear_errors(), needs=needs),
        make_word_case("errors-transfer", list_transfer_errors(), needs=needs),
        make_word_case("errors-export", list_export_errors(), needs=needs),
    ]


def list_usage_errors() -> list[str]:
    """Wrong options, arguments and names."""
    return [
        "pretrian",
        "pretrain --nonsense",
        "pretrain --preset",
        "pretrain --preset demo --seed abc",
        "pretrain --preset demmo",
        "pretrain --preset demo.yaml",
        "pretrain --preset demo --device tpu",
        "presets show nope",
        "presets cp demo data/note.txt",
        "presets cp demo nowhere/at/all.yaml",
        "export",
        "bench --preset linear-imagenet",
    ]


def list_config_errors() -> list[str]:
    """Wrong keys and values, and keys that contradict each other."""
    wrong = [
        sets("loss.betta=1"),
        sets("loss=1"),
        sets("nothing"),
        sets("optim.batch_size=abc"),
        sets("optim.batch_size=1"),
        sets("loss.beta=-1"),
        sets("views.large.area=[0.5, 0.1]"),
        sets("objective=relic", "views.large.count=3"),
        sets("objective=byol", "loss.beta=1"),
        sets("objective=simclr", "views.large.count=1", "views.small.count=0"),
        sets("optim.batch_size=16", "loss.negatives=64"),
        sets("optim.warmup_epochs=99"),
        sets("optim.microbatch=5"),
        sets("bgmask.source=bank"),
        sets("bgmask.fill=gray"),
        sets("model.width=0.3"),
        sets("objective=mae"),
        sets("data.cache=tape"),
        sets("seed=1.5"),
        "--config configs/tiny.yaml",
    ]
    files = ["missing.yaml", "broken.yaml", "twice.yaml", "other.yaml"]
    return [
        *(f"pretrain --preset demo {keys} --dry-run" for keys in wrong),
        *(f"pretrain --config configs/{name} --dry-run" for name in files),
    ]


def list_data_errors() -> list[str]:
    """Data that cannot be used, and a run that diverges."""
    unusable = [
        "data/none",
        "data/empty",
        "data/note.txt",
        "data/broken.zip",
        "data/photos.zip#nowhere",
        "shapes:colour=1",
        "torchvision:NOPE",
        "torchvision:CIFAR10:data/empty",
        "'data/sets-{8..9}.zip'",
        "data/single",
    ]
    unreadable = f"--data data/unreadable --val data/sets/val {sets('optim.batch_size=4', 'loss.negatives=2')}"
    return [
        *(f"pretrain {TINY} --data {data} --out runs/errors-data" for data in unusable),
        f"pretrain {TINY} {unreadable} --out runs/errors-unreadable",
        f"pretrain {TINY} --data data/photos --out data/photos/run",
        f"pretrain {TINY} {sets('optim.batch_size=512')} --out runs/errors-batch",
        f"pretrain {TINY} {sets('optim.base_lr=1e30')} --out runs/errors-diverged",
    ]


def list_run_errors() -> list[str]:
    """Folders that are occupied, and continuations that would be another run."""
    return [
        f"pretrain {TINY} --out {RUN}",
        f"pretrain {TINY} --out data/note.txt",
        f"pretrain {TINY} --out data/photos --overwrite",
        f"pretrain --resume {RUN} {sets('loss.temperature=9')}",
        f"pretrain --resume {RUN} --overwrite",
        f"pretrain --resume {RUN} --data data/photos",
        "pretrain --resume data/photos",
        f"train-bgmask --resume {RUN}",
        f"pretrain {TINY} --init-from data/broken.safetensors --out runs/errors-init",
        f"pretrain {TINY} {sets('model.width=0.25')} --init-from {RUN} --out runs/errors-init",
    ]


def list_bgmask_errors() -> list[str]:
    """Wrong masks, and wrong trainings of masks."""
    masks, out = "train-bgmask --config configs/masks.yaml", "--out runs/errors-bgmask"
    return [
        "train-bgmask --preset u2netp",
        f"train-bgmask --preset u2netp --data shapes --init-from {RUN} --dry-run",
        f"train-bgmask --preset u2netp {sets('loss.bce=0', 'loss.iou=0')} --dry-run",
        f"{masks} {sets('optim.batch_size=64')} {out}",
        f"{masks} --eval-data data/photos {out}",
        f"pretrain {TINY} --bgmask data/none --out runs/errors-bank",
        f"pretrain {TINY} --bgmask {RUN} --out runs/errors-bank",
        f"pretrain {TINY} --data data/photos --bgmask runs/bgmask-u2netp --out runs/errors-bank",
    ]


def list_linear_errors() -> list[str]:
    """Wrong linear evaluations."""
    out = "--out runs/errors-linear"
    return [
        "linear-eval",
        f"linear-eval {RUN} random {out}",
        f"linear-eval {RUN} --test nonsense {out}",
        f"linear-eval runs/none {out}",
        f"linear-eval {RUN} --data data/photos {CPU} {out}",
        "linear-eval --resume runs/none",
        f"linear-eval {RUN} {sets('crop.flip=0')} {out}",
        f"linear-eval torchvision:resnet19 --data {SHAPES} --val {SHAPES} {out}",
    ]


def list_transfer_errors() -> list[str]:
    """Wrong comparisons."""
    data, out = "--data photos=data/sets", "--out runs/errors-transfer"
    return [
        f"transfer {data} {out}",
        f"transfer {RUN} {out}",
        f"transfer {RUN} --baseline {RUN} {data} {out}",
        f"transfer {RUN} --data nonsense {out}",
        f"transfer {RUN} {data} --labels 2.5 {out}",
        f"transfer {RUN} {data} --protocol magic {out}",
        f"transfer {RUN} {data} --task painting {out}",
        f"transfer {RUN} {data} --task detection --labels 0.1 {out}",
        f"transfer {RUN} {RUN}/encoder.safetensors {data} {CPU} {out}",
        f"transfer {RUN} --data photos=data/photos {CPU} {out}",
        f"transfer pixels --task segmentation --data discs=data/segmentation {CPU} {out}",
    ]


def list_export_errors() -> list[str]:
    """Exports that cannot be."""
    export, out = f"export {RUN} --format", "--out exports/none"
    return [
        f"{export} keras {out}",
        f"{export} torchvision {out}.safetensors",
        f"{export} timm {out}",
        f"{export} relicctl --out data/note.txt",
        f"{export} relicctl {out}.safetensors --from nowhere",
        f"export data/broken.safetensors --format relicctl {out}.safetensors",
        f"export data/note.txt --from deepmind --format relicctl {out}.safetensors",
    ]
