"""The cases that are recorded: what is run, on what, and what it leaves.

Config keys are written as the old tree names them; the table of renamed keys translates them for the new one.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from golden_lib.inputs import SHAPES

TINY = "--config configs/tiny.yaml --seed 1"
MASKS = "--config configs/masks.yaml --seed 1"
CPU = "--device cpu --workers 0"
HELD_OUT = "shapes:train=48,val=16,size=32"
LABELLED = "--data data/sets/train --val data/sets/test"


@dataclass(frozen=True)
class Command:
    """One command line, without ``relicctl``. ``outline_only``: of its JSON, which is measured, only keys count."""

    line: str
    ranks: int = 1
    stdin: str = ""
    outline_only: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        """The words of the line."""
        return tuple(shlex.split(self.line))


@dataclass(frozen=True)
class Case:
    """Commands run one after the other, and the files and folders that are looked at after the last.

    ``words``: help and errors, whose text may change as a whole; elsewhere the numbers in a text must stay.
    """

    name: str
    commands: tuple[Command, ...]
    outputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    words: bool = False


def sets(*assignments: str) -> str:
    """``--set`` before each assignment."""
    return " ".join(f"--set {shlex.quote(assignment)}" for assignment in assignments)


def run(name: str, line: str, *, needs: Sequence[str] = (), ranks: int = 1, stdin: str = "") -> Case:
    """A case of one command that leaves ``runs/NAME``."""
    out = f"runs/{name}"
    return Case(name, (Command(f"{line} --out {out}", ranks, stdin),), (out,), tuple(needs))


def list_cases(tree: Path) -> list[Case]:
    """All cases, those that others need first."""
    from golden_lib.errors import list_error_cases

    return [
        *list_pretrain_cases(),
        *list_bgmask_cases(),
        *list_evaluation_cases(),
        *list_dense_cases(),
        *list_export_cases(),
        *list_word_cases(tree),
        *list_error_cases(),
    ]


def list_pretrain_cases() -> list[Case]:
    """Objectives, optimisers, paths of the crops, masks, ranks, and going on."""
    full = sets("model.width=1", "model.stem=imagenet", "optim.max_steps=1", "optim.batch_size=8", "loss.negatives=4")
    crops = sets("views.large.count=3", "views.small.count=1", "data.cache=none", "optim.name=lars", "target.ema=0.9")
    packed = sets("model.padding=same", "model.stem=imagenet", "data.cache=none", "data.subset=20", "data.val=null")
    held_out = sets("eval.holdout=0.25", "eval.every_epochs=2", "checkpoint.keep=1", "optim.name=sgd")
    deep = sets("model.arch=resnet50", "model.stem=cifar", "optim.max_steps=2", "views.large.size=24")
    alpha = sets("bgmask.source=alpha", "bgmask.probability=0.5", "bgmask.fill=noise", "optim.batch_size=12")
    often, val = sets("bgmask.probability=0.6"), "--val data/sets/val"
    interrupted, masks = "runs/pretrain-interrupted", "runs/bgmask-u2netp"
    resume = f"pretrain --resume {interrupted} {sets('optim.max_steps=null')} --json"
    return [
        run("pretrain-relicv2", f"pretrain {TINY} {sets('loss.beta=1')}"),
        run("pretrain-full-width", f"pretrain {TINY} {full} {sets('eval.every_epochs=0', 'views.small.count=0')}"),
        run("pretrain-relic", f"pretrain {TINY} {sets('objective=relic')} --json"),
        run("pretrain-simclr", f"pretrain {TINY} {sets('objective=simclr')}"),
        run("pretrain-byol", f"pretrain {TINY} {sets('objective=byol')}"),
        run("pretrain-supervised", f"pretrain {TINY} {sets('objective=supervised')}"),
        run("pretrain-device-cache", f"pretrain {TINY} {sets('data.cache=device', 'loss.invariance=swapped')}"),
        run("pretrain-microbatch", f"pretrain {TINY} {sets('optim.microbatch=4', 'loss.negatives=all')}"),
        run("pretrain-host-crops", f"pretrain {TINY} --data data/photos {val} --workers 2 {crops}"),
        run("pretrain-zip", f"pretrain {TINY} --data data/photos.zip#all --quiet {packed} {held_out}"),
        run("pretrain-resnet50", f"pretrain {TINY} {deep} {sets('runtime.activation_checkpointing=true')}"),
        run(
            "pretrain-bad-images",
            f"pretrain {TINY} --data data/flawed {val} {sets('data.max_bad=0.2', 'optim.batch_size=12')}",
        ),
        run("pretrain-alpha-masks", f"pretrain {TINY} --data data/alpha {val} {alpha}"),
        run("pretrain-two-ranks", f"pretrain {TINY} {sets('data.cache=none', 'optim.microbatch=4')}", ranks=2),
        run("pretrain-two-ranks-byol", f"pretrain {TINY} {sets('objective=byol', 'data.cache=device')}", ranks=2),
        Case(
            "pretrain-interrupted",
            (
                Command(f"pretrain {TINY} {sets('loss.beta=1', 'optim.max_steps=3')} --out {interrupted} --resume"),
                Command(resume),
            ),
            (interrupted,),
        ),
        run("pretrain-init-from", f"pretrain {TINY} --init-from runs/pretrain-relicv2", needs=["pretrain-relicv2"]),
        run("pretrain-bank-masks", f"pretrain {TINY} --bgmask {masks} {often}", needs=["bgmask-u2netp"]),
        run(
            "pretrain-bank-masks-host",
            f"pretrain {TINY} --bgmask {masks}/masks.bank {often} {sets('bgmask.fill=gray', 'data.cache=none')}",
            needs=["bgmask-u2netp"],
        ),
    ]


def list_bgmask_cases() -> list[Case]:
    """Both kinds of network, with and without priors as input, further masks, two ranks."""
    small = sets("model.arch=resnet", "model.priors=true", "loss.f=0", "refine.cut=0.8", "labels.drop=0.1")
    resnet = f"train-bgmask {MASKS} --data data/photos --data {SHAPES} {small} --init-from runs/pretrain-host-crops"
    out = "runs/bgmask-resnet"
    more = Command(f"train-bgmask --resume {out} --masks-for data/alpha --json")
    short = sets("model.arch=resnet", "rounds.count=0", "predict.refine=guided", "data.images=16")
    return [
        run("bgmask-u2netp", f"train-bgmask {MASKS} --eval-data {HELD_OUT}"),
        Case("bgmask-resnet", (Command(f"{resnet} --out {out}"), more), (out,), ("pretrain-host-crops",)),
        run("bgmask-two-ranks", f"train-bgmask {MASKS} {short}", ranks=2),
    ]


def list_evaluation_cases() -> list[Case]:
    """Linear evaluation by both protocols, and transfer by every protocol."""
    encoder, needs = "runs/pretrain-relicv2", ["pretrain-relicv2"]
    short = sets("optim.epochs=2", "checkpoint.every_steps=2", "runtime.log_every=1", "runtime.precision=fp32")
    imagenet = f"linear-eval --preset linear-imagenet {encoder} {CPU} {short} {sets('optim.batch_size=16')}"
    rates = sets("sweep.rates=[0.3, 0.1]", "data.cache=memory")
    swapped = "swapped=shapes:train=48,val=16,size=32,backgrounds=swapped"
    compared = f"linear-eval {encoder} random:{encoder} pixels:{encoder} --analysis {CPU} {LABELLED}"
    target = f"linear-eval - --network target {CPU} --data data/photos"

    tuned = sets("finetune.rates=[0.02, 0.1]", "finetune.steps=3", "finetune.batch_size=8", "runtime.log_every=1")
    semi = sets("finetune.rates=[0.05]", "finetune.epochs=[1, 2]", "finetune.batch_size=8", "eval.size=32")
    transfer = f"transfer {encoder} {CPU} {sets('runtime.precision=fp32')}"
    photos, memory = "--data photos=data/sets", sets("data.cache=memory")
    packed = "--data packed=data/sets-{split}.zip " + sets("data.metrics={packed: mean_per_class}")
    judged = "--protocol logistic --protocol knn " + sets("logistic.lambdas=[0.001, 1, 1000]", "knn.ks=[3, 10]")
    known = "--labels all --labels 0.5 --labels 3-per-class"
    several = "--data voc=data/voc --data table=data/table --protocol logistic --protocol finetune"
    drawn = "--data photos=data/photos --protocol knn " + sets("data.draw={photos: [6, 4]}", "knn.ks=[5]")
    return [
        run("linear-fast", f"linear-eval {encoder} {CPU} --test {swapped} {sets('optim.epochs=3')} --json",
            needs=needs),
        run("linear-analysis", f"{compared} {sets('optim.epochs=2', 'sweep.rates=[0.1]')}", needs=needs),
        run(
            "linear-target",
            f"{target} {sets('optim.epochs=2', 'eval.holdout=0.3')}",
            needs=needs,
            stdin=f"{encoder}\n",
        ),
        run("linear-imagenet", f"{imagenet} {rates}", needs=needs),
        run("linear-imagenet-no-sweep", f"{imagenet} {sets('data.cache=none')} {LABELLED}", needs=needs),
        run("linear-two-ranks", f"{imagenet} {rates}", needs=needs, ranks=2),
        Case(
            "linear-beside-the-run",
            (Command(f"linear-eval runs/pretrain-byol {CPU} {sets('optim.epochs=1')}"),),
            ("runs/pretrain-byol/linear-eval",),
            ("pretrain-byol",),
        ),
        run(
            "linear-full-width",
            f"linear-eval runs/pretrain-full-width {CPU} {sets('optim.epochs=1')} {LABELLED}",
            needs=["pretrain-full-width"],
        ),
        run("transfer-frozen", f"{transfer} --baseline random --baseline pixels {photos} {packed} {judged} {known}",
            needs=needs),
        run("transfer-finetune", f"{transfer} --baseline random {photos} --protocol finetune {tuned} {memory} "
            f"{sets('finetune.decays=[0.0, 0.001]')} --json", needs=needs),
        run("transfer-semi", f"{transfer} --preset semi-10pct {photos} --labels 0.5 {semi} "
            f"{sets('data.test_split={photos: val}', 'data.cache=none')}", needs=needs),
        run("transfer-several-classes", f"{transfer} {several} {tuned} {memory} {sets('logistic.lambdas=[0.01, 1]')}",
            needs=needs),
        run("transfer-drawn", f"{transfer} runs/pretrain-byol {drawn}", needs=["pretrain-byol", *needs]),
        run("transfer-two-ranks", f"{transfer} {photos} --protocol knn --protocol finetune {tuned} {memory}",
            needs=needs, ranks=2),
    ]  # fmt: skip


def list_dense_cases() -> list[Case]:
    """Segmentation and detection, frozen and fine-tuned, on every layout of the data."""
    needs = ["pretrain-relicv2"]
    short = sets("optim.steps=3", "optim.batch_size=4", "checkpoint.every_steps=2", "runtime.log_every=1")
    common = f"transfer runs/pretrain-relicv2 {CPU} {short} {sets('runtime.precision=fp32')} --task"
    segmentation = f"{common} segmentation --preset segmentation-quick {sets('crop.size=32')}"
    sizes = sets("images.short=[40, 48]", "images.long=64", "optim.warmup_steps=1", "head.regions=16")
    detection = f"{common} detection --preset detection-quick {sizes}"
    frozen = sets("model.frozen=true", "optim.drops=[0.5]", "data.cache=none")
    shapes = "--data shapes=shapes:size=48,train=12,val=6"
    layouts = "--data voc=data/voc --data coco=data/coco"
    return [
        run("segmentation-shapes", f"{segmentation} --baseline random {shapes}", needs=needs),
        run("segmentation-frozen", f"{segmentation} --data discs=data/segmentation {frozen} --json", needs=needs),
        run("segmentation-two-ranks", f"{segmentation} {shapes}", needs=needs, ranks=2),
        run("detection-shapes", f"{detection} --baseline random {shapes}", needs=needs),
        run("detection-layouts", f"{detection} {layouts} {sets('model.norm=frozen')}", needs=needs),
    ]


def list_export_cases() -> list[Case]:
    """Every format, from a run, its target network, a checkpoint and weights; with a classifier as head."""
    narrow, full = "runs/pretrain-relicv2", "runs/pretrain-full-width"
    of_narrow, of_full = ("pretrain-relicv2",), ("pretrain-full-width", "linear-full-width")
    head = "--classifier runs/linear-full-width --license mit"
    checkpoint = f"{narrow}/checkpoints/step-00000006.safetensors"

    def export(name: str, source: str, out: str, *, needs: tuple[str, ...], more: str = "") -> Case:
        line = f"export {source} --format {name.split('-')[1]} --out exports/{out} --json {more}"
        card = (f"exports/{Path(out).stem}.card.md",) if "." in out else ()
        return Case(name, (Command(line),), (f"exports/{out}", *card), needs)

    return [
        export("export-relicctl", narrow, "encoder.safetensors", needs=of_narrow),
        export("export-relicctl-target", checkpoint, "target.safetensors", more="--network target", needs=of_narrow),
        export("export-torchvision", full, "torchvision.safetensors", more=head, needs=of_full),
        export("export-timm", full, "timm", needs=of_full),
        export("export-timm-head", full, "timm-head", more=head, needs=of_full),
        export("export-transformers", full, "transformers", more=head, needs=of_full),
        export("export-onnx", f"{narrow}/encoder.safetensors", "narrow.onnx", needs=of_narrow),
    ]


def list_word_cases(tree: Path) -> list[Case]:
    """Help, presets, dry runs, and the keys of measurements."""
    names = ("pretrain", "train-bgmask", "linear-eval", "transfer", "export", "bench", "doctor", "presets")
    helps = ["", "--help", "--version", "presets", *(f"{name} --help" for name in names)]
    helps += [f"presets {name} --help" for name in ("ls", "show", "cp")]
    folder = next(path for path in (tree / "relicctl/presets", tree / "presets") if path.is_dir())
    shown = [f"presets show {path.stem}" for path in sorted(folder.glob("*.yaml"))]
    large = sets("optim.batch_size=16", "loss.beta=1")
    dry_runs = [
        f"pretrain --preset demo --data {SHAPES} {CPU}",
        f"pretrain --preset r50-1000ep --data {SHAPES} {CPU} {large}",
        f"pretrain {TINY} --json",
        f"train-bgmask --preset u2netp --data {SHAPES} {CPU} {sets('runtime.precision=fp32')}",
        f"train-bgmask {MASKS} --eval-data {HELD_OUT} --json",
        "linear-eval runs/pretrain-relicv2",
        f"linear-eval --preset linear-imagenet random --data {SHAPES}",
        "transfer random --preset byol-suite",
        "transfer random --preset finetune-byol --data photos=data/sets --labels 0.1",
        "transfer random --task segmentation --preset voc-segmentation --data voc=data/voc",
        "transfer random --task detection --preset coco-detection --data coco=data/coco",
    ]
    bench = f"bench {TINY.split(' --seed')[0]} {CPU} {sets('optim.batch_size=16')} --batch 8 --repeats 1 --json"
    return [
        make_word_case("dry-run", [f"{line} --dry-run" for line in dry_runs], words=False, needs=["pretrain-relicv2"]),
        Case("bench", (Command(bench, outline_only=True),)),
        Case("doctor", (Command(f"doctor {CPU} --json", outline_only=True),)),
        make_word_case("help", helps),
        make_word_case("presets", ["presets ls", *shown, "presets cp demo demo-copy.yaml"], words=False),
    ]


def make_word_case(name: str, lines: list[str], *, words: bool = True, needs: Sequence[str] = ()) -> Case:
    """A case of command lines of which only the answers count."""
    return Case(name, tuple(map(Command, lines)), needs=tuple(needs), words=words)
