"""Laws of a training of masks: true masks teach nothing, killed and resumed = never killed; and bad input."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from relicctl.bgmask import images as saliency_photos
from relicctl.bgmask import self_training
from relicctl.bgmask.evaluate import METRICS
from relicctl.bgmask.network import load_saliency_net
from relicctl.bgmask.prior_cache import PriorCache
from relicctl.bgmask.priors.maps import PRIOR_NAMES
from relicctl.cli import run as relicctl
from relicctl.data import mask_bank, memmap_table
from relicctl.data.datasets.joined import open_joined_dataset
from relicctl.data.datasets.open import open_dataset
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.mask_bank import MaskBank, MaskBankWriter
from relicctl.encoders.file import save_encoder
from relicctl.errors import Terminated
from relicctl.runs.folder import RunFolder
from tests.helpers.runs import lively_encoder

TINY = """
model: {{arch: resnet, size: 32, encoder: {encoder}}}
labels: {{size: 32, drop_fraction: 0.0}}
self_training: {{rounds: 1, epochs: 1}}
optim: {{batch_size: 4, epochs: 2, warmup_epochs: 0.5}}
data: {{train: "shapes:size=32,train=12,val=4"}}
predict: {{batch_size: 4}}
checkpoint: {{every_steps: 1, every_minutes: null}}
runtime: {{device: cpu, log_every: 1, precision: fp32, threads: 1, workers: 0}}
"""
STEPS = 3 * 3
EVAL = "shapes:size=32,train=12,val=4"
HINTS = ("--set", "model.prior_channels=true")
TIMINGS = {"images_per_s", "data_wait", "eta_s"}


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    how = {"size": "32", "crop_ratio": "1.0", "mean": "[0.5, 0.5, 0.5]", "std": "[0.2, 0.2, 0.2]"}
    save_encoder(path, lively_encoder("resnet18", 0.125, "stride2"), {"network": "online", **how})
    return path


@pytest.fixture
def tiny(tmp_path, encoder) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(encoder=encoder))
    return path


@pytest.fixture(scope="session")
def whole(tmp_path_factory, encoder) -> Path:
    """A run that nothing disturbed, with true masks measured."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(TINY.format(encoder=encoder))
    assert train_bgmask(folder / "tiny.yaml", folder / "run", "--eval-data", EVAL) == 0
    return folder / "run"


def train_bgmask(tiny: Path, out: Path, *arguments: str) -> int:
    return relicctl(["train-bgmask", "--config", str(tiny), "--out", str(out), "--quiet", *arguments])


def resume(run: Path, *arguments: str) -> int:
    return relicctl(["train-bgmask", "--resume", str(run), "--quiet", *arguments])


def results_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def network_of(run: Path) -> dict[str, bytes]:
    """The final network's tensors; the order of a file's metadata is not told."""
    tensors = load_file(run / "saliency.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def assert_same(one: Path, other: Path, *names: str) -> None:
    """The same network, steps and masks to the bit, and the same files."""
    assert network_of(one) == network_of(other)
    for name in ("masks.bank", *(names or ("results.json",))):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert metrics_of(one) == metrics_of(other)


# What a run leaves.


def test_a_run_leaves_what_the_docs_promise(whole, tmp_path, tiny, capsys):
    results = results_of(whole)
    names = [stage["name"] for stage in results["stages"]]
    assert names == [
        "centre prior", "rbd", "mc", "dsr", "mr", "mean of priors", "fused labels", "round 1", "final",
    ]  # fmt: skip
    for stage in results["stages"]:
        assert stage["images"] == 4
        assert all(0 <= stage[name] <= 1 for name in METRICS)
    assert -1 <= results["prior_agreement"]["mean"] <= 1
    assert len(results["prior_agreement"]["pairs"]) == 6
    assert set(results["invalid_priors"].values()) == {0}
    assert results["masks"].keys() == {"count", "foreground", "empty", "full"}
    assert (results["masks"]["count"], results["images"], results["bad_images"]) == (12, 12, 0)
    assert [line["step"] for line in metrics_of(whole)] == list(range(1, STEPS + 1))
    assert (whole / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert "data_fingerprint" in (whole / "config.yaml").read_text()
    assert {path.name for path in whole.iterdir()} >= {"priors", "stages", "checkpoints", "saliency.safetensors"}
    bank, source = MaskBank.open(whole), open_dataset(EVAL)
    assert list(bank.find_rows(source)) == list(range(12))
    assert results["masks"]["foreground"] == pytest.approx(np.mean([bank.load_mask(row).mean() for row in range(12)]))
    capsys.readouterr()
    assert resume(whole) == 0
    assert capsys.readouterr().out == f"{whole}\n"  # nothing else on stdout


def test_json_prints_one_object_and_stderr_has_the_table(whole, capsys):
    assert relicctl(["train-bgmask", "--resume", str(whole), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"run": str(whole), **results_of(whole)}
    for shown in ("max-F", "centre prior", "round 1", "final", "agreement of priors", "12 masks"):
        assert shown in said.err


def test_a_dry_run_starts_nothing(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert relicctl(["train-bgmask", "--config", str(tiny), "--eval-data", EVAL, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "from --eval-data",
        "12 to train on",
        "4 with ground-truth masks",
        "round 1",
        f"{STEPS} in all",
        "activations",
    ):
        assert text in shown
    (tmp_path / "again.yaml").write_text(shown)
    assert relicctl(["train-bgmask", "--config", "again.yaml", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["images"], planned["masks"], planned["total_steps"]) == (12, 12, STEPS)
    assert not (tmp_path / "runs").exists()


# Laws.


def test_true_masks_do_not_affect_training(tiny, tmp_path, whole, monkeypatch):
    """Without them, and with wrong ones, the networks and the masks are the same to the bit; the figures are not."""
    assert train_bgmask(tiny, tmp_path / "without") == 0
    assert results_of(tmp_path / "without")["stages"] == []
    right = ShapesDataset.load_mask
    monkeypatch.setattr(ShapesDataset, "load_mask", lambda self, index: ~right(self, index))
    assert train_bgmask(tiny, tmp_path / "wrong", "--eval-data", EVAL) == 0
    for other in ("without", "wrong"):
        assert_same(whole, tmp_path / other, "sheet.png", "priors")
    assert results_of(tmp_path / "wrong")["stages"] != results_of(whole)["stages"]


@pytest.mark.parametrize("priors", ["false", "true"])
def test_training_opens_no_true_masks(tiny, tmp_path, monkeypatch, priors):
    """They are read while stages are measured, and at no other time."""
    inside: list[bool] = []
    asked: list[bool] = []
    right = ShapesDataset.load_mask

    def mask(self: ShapesDataset, index: int) -> np.ndarray:
        asked.append(bool(inside))
        return right(self, index)

    from relicctl.bgmask.evaluate import StageTable

    measuring = StageTable.add_stage

    def add(self: StageTable, name: str, maps: Any) -> None:
        inside.append(True)
        measuring(self, name, maps)
        inside.pop()

    monkeypatch.setattr(ShapesDataset, "load_mask", mask)
    monkeypatch.setattr(StageTable, "add_stage", add)
    assert train_bgmask(tiny, tmp_path / "run", "--eval-data", EVAL, "--set", f"model.prior_channels={priors}") == 0
    assert len(asked) == 9 * 4
    assert all(asked)


def test_any_number_of_workers_gives_the_same_run(tiny, tmp_path, whole):
    assert train_bgmask(tiny, tmp_path / "two", "--workers", "2", "--eval-data", EVAL) == 0
    assert_same(whole, tmp_path / "two")


def test_without_prior_channels_priors_are_computed_for_labels_alone(tiny, tmp_path, whole, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("priors were made for a network that takes none")

    monkeypatch.setattr(saliency_photos, "compute_prior_maps", refuse)
    monkeypatch.setattr(self_training, "build_prior_channels", refuse)
    assert train_bgmask(tiny, tmp_path / "run", "--eval-data", EVAL) == 0
    assert_same(whole, tmp_path / "run")
    assert "hints" not in load_saliency_net(whole).metadata


@pytest.fixture(scope="session")
def hinted(tmp_path_factory, encoder) -> Path:
    """A run whose network is given the priors."""
    folder = tmp_path_factory.mktemp("hinted")
    (folder / "tiny.yaml").write_text(TINY.format(encoder=encoder))
    assert train_bgmask(folder / "tiny.yaml", folder / "run", "--eval-data", EVAL, *HINTS) == 0
    return folder / "run"


def test_prior_channels_change_the_network_but_not_the_labels(hinted, whole):
    assert load_saliency_net(hinted).hints == len(PRIOR_NAMES)
    assert network_of(hinted) != network_of(whole)
    rows, without = (results_of(run)["stages"] for run in (hinted, whole))
    assert rows[:7] == without[:7]  # to the labels
    assert all(mine != other for mine, other in zip(rows[7:], without[7:], strict=True))


def test_any_number_of_workers_gives_the_same_run_with_prior_channels(tiny, tmp_path, hinted):
    assert train_bgmask(tiny, tmp_path / "two", "--workers", "2", "--eval-data", EVAL, *HINTS) == 0
    assert_same(hinted, tmp_path / "two")


def test_masks_are_the_same_whether_their_priors_are_cached_or_computed(tiny, tmp_path, hinted, monkeypatch):
    """Those of the images trained on are there; of others they are made along the way, by any number of workers."""
    for workers in ("0", "2"):
        run = tmp_path / workers
        anew = ("--masks-for", EVAL, "--workers", workers)
        assert train_bgmask(tiny, run, *HINTS, *anew) == 0
        assert (run / "masks.bank").read_bytes() == (hinted / "masks.bank").read_bytes()
    assert train_bgmask(tiny, tmp_path / "some", *HINTS, "--set", "data.images=8") == 0  # of other rows
    monkeypatch.setattr(saliency_photos, "compute_prior_maps", lambda *_: pytest.fail("made again"))
    assert train_bgmask(tiny, tmp_path / "kept", *HINTS) == 0
    assert (tmp_path / "kept" / "masks.bank").read_bytes() == (hinted / "masks.bank").read_bytes()


def test_another_seed_gives_another_network(tiny, tmp_path, whole):
    assert train_bgmask(tiny, tmp_path / "other", "--seed", "1") == 0
    assert network_of(tmp_path / "other") != network_of(whole)


def killed(arguments: list[str], prepare: Callable[[], None]) -> None:
    """Run relicctl in a process of its own, which ``prepare`` makes kill itself by SIGKILL somewhere."""
    child = os.fork()
    if child == 0:
        try:
            prepare()
            relicctl(arguments)
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def kill_after(calls: int, owner: Any, name: str) -> Callable[[], None]:
    """When ``owner.name`` has returned so many times."""

    def prepare() -> None:
        mask_bank.FLUSH_EVERY = 2
        wrapped, left = getattr(owner, name), [calls]

        def call(*args: Any, **named: Any) -> Any:
            result = wrapped(*args, **named)
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, call)

    return prepare


MOMENTS = {
    "priors": (1, PriorCache, "_write"),
    "first labels": (1, self_training, "fuse_priors"),
    "a round's steps": (2, RunFolder, "save"),
    "a round's end": (4, self_training.checkpoint, "save_checkpoint"),
    "the final network's steps": (5, RunFolder, "save"),
    "masks": (7, MaskBankWriter, "write_mask"),
    "the sheet": (1, MaskBankWriter, "close"),
}


@pytest.mark.slow
def test_killed_at_every_stage_and_resumed_is_never_killed(tiny, tmp_path, whole):
    """One run, killed again and again: each time it goes on where it was, to the same bytes."""
    run = tmp_path / "run"
    arguments = ["--config", str(tiny), "--out", str(run), "--eval-data", EVAL]
    for moment, where in MOMENTS.items():
        killed(["train-bgmask", "--quiet", *arguments], kill_after(*where))
        assert not (run / "results.json").exists(), moment
        arguments = ["--resume", str(run)]
        if moment == "a round's steps":
            assert len(metrics_of(run)) == 2
        if moment == "masks":
            assert not (run / "masks.bank").exists()
    assert resume(run) == 0
    assert_same(whole, run)


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)], ids=["interrupted", "terminated"]
)
def test_a_signal_while_priors_are_computed_says_how_to_resume(tiny, tmp_path, monkeypatch, capsys, stop, code):
    def stopped(*_: Any) -> None:
        raise stop

    run = tmp_path / "run"
    monkeypatch.setattr(PriorCache, "fill", stopped)
    assert train_bgmask(tiny, run) == code
    error = capsys.readouterr().err
    assert f"relicctl train-bgmask --resume {run}" in error
    assert "Traceback" not in error


def test_a_full_disk_is_reported_and_nothing_is_lost(tiny, tmp_path, whole, monkeypatch, capsys):
    """At the priors, at a checkpoint, at a mask: each time the run goes on when there is room."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = tmp_path / "run"
    arguments = ["--config", str(tiny), "--out", str(run), "--eval-data", EVAL]
    for owner, name in (
        (memmap_table, "write_at"),
        (self_training.checkpoint, "save_tensors"),
        (memmap_table, "write_at"),
    ):
        with monkeypatch.context() as broken:
            broken.setattr(owner, name, full)
            assert relicctl(["train-bgmask", "--quiet", *arguments]) == 1, name
        error = capsys.readouterr().err
        assert "No space left" in error or "The disk is full" in error
        assert "resume" in error
        arguments = ["--resume", str(run)]
    assert resume(run) == 0
    assert_same(whole, run)


# Several data sets.


def test_the_first_of_several_data_sets_gets_the_masks_and_others_can_later(tiny, tmp_path, encoder, capsys):
    photos(tmp_path / "more", 6)
    run, second = tmp_path / "run", str(tmp_path / "more")
    assert train_bgmask(tiny, run, "--data", "shapes:size=32,train=8,val=4", "--data", second) == 0
    assert results_of(run)["images"] == 8 + 6
    bank = MaskBank.open(run)
    drawn = open_dataset("shapes:size=32,train=8,val=4")
    assert list(bank.find_rows(drawn)) == list(range(8))

    assert resume(run, "--masks-for", second) == 0
    assert list(MaskBank.open(run).find_rows(open_dataset(second))) == list(range(6))
    assert results_of(run)["masks"]["count"] == 6
    (aside,) = run.glob("masks-*.bank")
    assert MaskBank.open(aside).identity == bank.identity
    found, rows = MaskBank.open_for(run, drawn)  # what is set aside still serves its own images
    assert (found.identity, list(rows)) == (bank.identity, list(range(8)))
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", status["last_checkpoint_step"])
    both = ("shapes:size=32,train=8,val=4", second)
    assert resume(run, "--masks-for", both[0], "--masks-for", both[1]) == 0
    assert list(MaskBank.open(run).find_rows(open_joined_dataset(both))) == list(range(8 + 6))
    assert resume(run, "--data", second, "--data", "shapes:size=32,train=8,val=4") == 3
    assert "images are not those" in capsys.readouterr().err


# Bad input.


def photos(folder: Path, count: int, size: tuple[int, int] = (40, 30)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 80, (size[1], size[0], 3), np.uint8)
        pixels[8:20, 10:25] += np.uint8(120 + number)
        Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.mark.parametrize("priors", ["false", "true"])
def test_extreme_images_get_masks_and_nothing_is_nan(tiny, tmp_path, priors):
    folder, run = tmp_path / "photos", tmp_path / "run"
    photos(folder, 6)
    Image.new("RGB", (30, 30), (9, 99, 9)).save(folder / "even.png")
    Image.new("RGB", (1, 40), (200, 0, 0)).save(folder / "narrow.png")
    Image.new("RGB", (20_000, 8), (0, 0, 200)).save(folder / "wide.png")
    Image.new("RGB", (1, 1)).save(folder / "point.png")
    assert train_bgmask(tiny, run, "--data", str(folder), "--set", f"model.prior_channels={priors}") == 0
    assert all(np.isfinite(tensor.float()).all() for tensor in load_saliency_net(run).state_dict().values())
    results = json.loads((run / "results.json").read_text(), parse_constant=pytest.fail)  # a NaN would be one
    assert results["images"] == results["masks"]["count"] == 10
    assert sum(results["invalid_priors"].values()) > 0
    for line in metrics_of(run):
        assert np.isfinite(line["loss"])


@pytest.mark.parametrize("priors", ["false", "true"])
def test_images_of_one_colour_give_finite_results(tiny, tmp_path, priors):
    for number in range(4):
        path = tmp_path / "even" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (number * 40, 10, 10)).save(path)
    run = tmp_path / "run"
    assert train_bgmask(tiny, run, "--data", str(tmp_path / "even"), "--set", f"model.prior_channels={priors}") == 0
    results = json.loads((run / "results.json").read_text(), parse_constant=pytest.fail)
    assert set(results["invalid_priors"].values()) == {4}
    assert results["prior_agreement"]["mean"] is None


def test_corrupt_images_are_listed_and_too_many_end_the_run(tiny, tmp_path, capsys):
    folder, run = tmp_path / "photos", tmp_path / "run"
    photos(folder, 9)
    (folder / "4.png").write_bytes(b"no picture")
    assert train_bgmask(tiny, run, "--data", str(folder), "--set", "data.max_corrupt_fraction=0.2") == 0
    assert (run / "bad_images.txt").read_text().splitlines()[0].startswith("4.png\t")
    assert len((run / "bad_images.txt").read_text().splitlines()) == 1
    results = results_of(run)
    assert (results["images"], results["masks"]["count"], results["bad_images"]) == (8, 9, 1)
    strict = ["--data", str(folder), "--set", "data.max_corrupt_fraction=0"]
    assert train_bgmask(tiny, tmp_path / "strict", *strict) == 3
    assert str(tmp_path / "strict" / "bad_images.txt") in capsys.readouterr().err


@pytest.fixture
def pairs(tmp_path) -> Path:
    root = tmp_path / "pairs"
    photos(root / "images", 3)
    (root / "masks").mkdir()
    for number in range(3):
        mask = np.zeros((30, 40), dtype=np.uint8)
        mask[8:20, 10:25] = 255
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return root


def test_files_with_true_masks_are_measured_on(tiny, tmp_path, pairs):
    run = tmp_path / "run"
    assert train_bgmask(tiny, run, "--eval-data", shutil.make_archive(str(pairs), "zip", pairs)) == 0
    stages = results_of(run)["stages"]
    assert [stage["images"] for stage in stages] == [3] * 9
    assert stages[1]["iou"] > 0.5  # a bright square on noise


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--data", "NOWHERE"], 3, "no folder or archive"),
        (["--data", "EMPTY"], 3, "is empty"),
        (["--data", "ONE"], 3, "one image"),
        (["--data", "THREE"], 2, "batch of 4 images is larger"),
        (["--set", "data.train=[]"], 2, "Missing --data"),
        (["--eval-data", "THREE"], 3, "no folder images"),
        (["--masks-for", "NOWHERE"], 3, "no folder or archive"),
        (["--init-from", "THREE"], 2, "no encoder weights"),
        (["--set", "model.arch=u2netp"], 2, "no encoder to start from"),
        (["--set", "model.archh=u2netp"], 2, "model.arch"),
        (["--set", "loss.bce=0", "--set", "loss.iou=0"], 2, "nothing is left to minimise"),
        (["--set", "data.max_eval_images=0"], 2, "data.max_eval_images"),
        (["--preset", "demo"], 2, "train-bgmask"),
        (["--device", "tpu"], 2, "runtime.device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_used_is_refused_before_a_folder_is_made(tiny, tmp_path, capsys, arguments, code, said):
    photos(tmp_path / "THREE", 3)
    photos(tmp_path / "ONE", 1)
    (tmp_path / "EMPTY").mkdir()
    places = {name: str(tmp_path / name) for name in ("NOWHERE", "EMPTY", "ONE", "THREE")}
    assert train_bgmask(tiny, tmp_path / "run", *(places.get(a, a) for a in arguments)) == code
    error = capsys.readouterr().err
    assert said in error
    assert "fix:" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_write_into_its_own_images(tiny, tmp_path, capsys):
    photos(tmp_path / "photos", 4)
    assert train_bgmask(tiny, tmp_path / "photos" / "run", "--data", str(tmp_path / "photos")) == 2
    assert "lies inside the data" in capsys.readouterr().err
    photos(tmp_path / "truth" / "images", 4)
    data = ("--data", str(tmp_path / "photos"), "--eval-data", str(tmp_path / "truth"))
    shutil.copytree(tmp_path / "truth/images", tmp_path / "truth/masks")
    assert train_bgmask(tiny, tmp_path / "truth/masks/run", *data) == 2
    assert "truth/masks)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--overwrite"],
        ["--init-from", "weights"],
        ["--out", "elsewhere"],
        ["--preset", "demo-bgmask"],
        ["--set", "self_training.rounds=2"],
        ["--set", "predict.threshold=0.4"],
        ["--seed", "3"],
    ],
    ids=" ".join,
)
def test_resume_refuses_what_would_make_another_run(whole, capsys, arguments):
    assert resume(whole, *arguments) == 2
    assert "error:" in capsys.readouterr().err


def test_runs_of_other_commands_are_not_resumed(tmp_path, monkeypatch, tiny, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "config.yaml").write_text("seed: 0\nrun: {preset: null}\n")
    assert relicctl(["train-bgmask", "--resume"]) == 2
    assert relicctl(["train-bgmask", "--resume", "runs/demo"]) == 2
    said = capsys.readouterr().err
    assert "is for `relicctl pretrain`" in said
    assert "Use `relicctl pretrain --resume runs/demo`." in said
    arguments = ["train-bgmask", "--config", str(tiny), "--quiet"]
    assert relicctl(arguments) == 0
    assert relicctl(["train-bgmask", "--resume", "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "runs/train-bgmask"
    assert relicctl(["pretrain", "--resume", "runs/train-bgmask"]) == 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("option", ["--data", "--masks-for"])
def test_true_masks_among_the_images_are_refused(tiny, tmp_path, pairs, capsys, option, packed):
    place = shutil.make_archive(str(pairs), "zip", pairs) if packed else str(pairs)
    assert train_bgmask(tiny, tmp_path / "run", "--eval-data", place, option, place) == 3
    error = capsys.readouterr().err
    assert "holds the true masks" in error
    assert f"{place}#images" in error
    assert not (tmp_path / "run").exists()


def test_an_encoder_trained_with_labels_is_refused(tiny, tmp_path, encoder, capsys):
    path = tmp_path / "supervised.safetensors"
    how = {"size": "32", "crop_ratio": "1.0", "mean": "[0.5, 0.5, 0.5]", "std": "[0.2, 0.2, 0.2]"}
    save_encoder(path, lively_encoder("resnet18", 0.125, "stride2"), {"objective": "supervised", **how})
    assert train_bgmask(tiny, tmp_path / "run", "--init-from", str(path)) == 2
    assert "trained with labels" in capsys.readouterr().err


def test_a_finished_run_does_not_need_its_encoder_and_restores_masks_set_aside(tmp_path, encoder, capsys):
    moving = tmp_path / "moving.safetensors"
    shutil.copy(encoder, moving)
    (tmp_path / "tiny.yaml").write_text(TINY.format(encoder=moving))
    run = tmp_path / "run"
    assert train_bgmask(tmp_path / "tiny.yaml", run) == 0
    moving.unlink()
    before = (run / "masks.bank").stat().st_ino
    photos(tmp_path / "more", 6)
    assert resume(run, "--masks-for", str(tmp_path / "more")) == 0
    assert MaskBank.open(run).count == 6
    assert resume(run, "--set", "data.mask_data=null") == 0
    assert (run / "masks.bank").stat().st_ino == before
