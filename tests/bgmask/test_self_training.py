"""The stages of training masks: from priors to a network, stopped anywhere and resumed."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from relicctl.bgmask.images import load_resized_images
from relicctl.bgmask.network import load_saliency_net
from relicctl.bgmask.priors.maps import PRIOR_NAMES
from relicctl.bgmask.self_training import count_total_steps, list_stages, run_self_training
from relicctl.config.base import CheckpointConfig, RuntimeConfig
from relicctl.config.bgmask import (
    BgmaskConfig,
    MaskAugmentConfig,
    MaskNetworkConfig,
    MaskOptimConfig,
    PredictConfig,
    PseudoLabelConfig,
    RefineConfig,
    SelfTrainingConfig,
)
from relicctl.console import Console
from relicctl.core.counter_rng import fork_seeded_rng
from relicctl.core.distributed import SINGLE_PROCESS
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.decoding import BadImages
from relicctl.encoders.file import save_encoder
from relicctl.models.resnet import build_encoder
from relicctl.runs.distributed import RunContext
from relicctl.runs.folder import RunFolder

CPU = torch.device("cpu")
SIDE, COUNT = 32, 12


class Killed(Exception):
    """Stands for a death that nothing in the process can answer."""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    with fork_seeded_rng(0):
        small = build_encoder("resnet18", 0.125)
    save_encoder(path, small, {"size": "32", "crop_ratio": "1.0", "mean": "[0.5, 0.5, 0.5]", "std": "[1, 1, 1]"})
    return path


@pytest.fixture(scope="module")
def photos():
    source = ShapesDataset.from_spec(f"shapes:size={SIDE},train={COUNT}", "train")
    return load_resized_images(source, SIDE, workers=0, bad=BadImages(COUNT, 0.0))


@pytest.fixture
def store():
    """A blob that wanders about the middle, and a coarser one, in turn."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    maps = np.zeros((COUNT, len(PRIOR_NAMES), SIDE, SIDE), np.uint8)
    for k in range(COUNT):
        far = np.hypot(rows - 12 - k % 5, columns - 18 + k % 3)
        maps[k, ::2], maps[k, 1::2] = 255 * np.exp(-((far / 8) ** 2)), 255 * np.exp(-((far / 11) ** 2))
    return SimpleNamespace(maps=maps, valid=np.ones(maps.shape[:2], bool))


def config_of(encoder, priors=False, **more):
    sections = {
        "model": MaskNetworkConfig(arch="resnet", size=32, init_encoder=str(encoder), prior_channels=priors),
        "labels": PseudoLabelConfig(size=SIDE, drop_fraction=0.25),
        "refine": RefineConfig(radius=2),
        "self_training": SelfTrainingConfig(rounds=1, epochs=2),
        "optim": MaskOptimConfig(batch_size=3, epochs=3),
        "augment": MaskAugmentConfig(scale=(0.5, 1.0)),
        "predict": PredictConfig(batch_size=5),
        "checkpoint": CheckpointConfig(every_steps=2),
        "runtime": RuntimeConfig(log_every=1),
    }
    return BgmaskConfig(**{**sections, **more})


class RecordingConsole(Console):
    """Passes every log line to ``show`` and adds warnings to ``warned``."""

    def __init__(self, show, warned):
        super().__init__(quiet=True)
        self._show, self._warned = show, warned

    def warn(self, text):
        self._warned.append(text)

    @contextmanager
    def progress(self, total, start=0):
        yield SimpleNamespace(update=self._show)


def run_stages(config, photos, store, path, *, resume=False, show=lambda step, metrics: None, warned=None):
    """Return the final network, and the names of the stages that ended."""
    if resume:
        run = RunFolder.reopen(path, keep=2)
    else:
        run = RunFolder.create(path, overwrite=False, keep=2)
        run.write_text(run.config_path, "")
    console = RecordingConsole(show, [] if warned is None else warned)
    context = RunContext(CPU, SINGLE_PROCESS, console, run)
    ended = []
    try:
        net = run_self_training(
            config, photos, store, context, resume_command="again", on_stage_end=lambda name, net: ended.append(name)
        )
    finally:
        run.close()
    return net, ended


def weights(path):
    """By name, as bytes: the order of a file's metadata is left to chance by safetensors."""
    return {name: t.numpy().tobytes() for name, t in load_file(path / "saliency.safetensors").items()}


def test_steps_are_counted_through_all_stages(encoder):
    stages = list_stages(config_of(encoder), COUNT)  # a quarter of the images is dropped: 3 steps an epoch
    assert [(s.name, s.first, s.last) for s in stages] == [("round 1", 0, 6), ("final", 6, 15)]
    assert count_total_steps(config_of(encoder), COUNT) == 15


@pytest.mark.parametrize("priors", [False, True])
def test_a_run_killed_at_any_stage_and_resumed_ends_with_the_same_bits(encoder, photos, store, tmp_path, priors):
    config, steps = config_of(encoder, priors), []
    _, ended = run_stages(config, photos, store, tmp_path / "whole", show=lambda step, metrics: steps.append(step))
    assert ended == ["round 1", "final"]
    assert steps == list(range(1, 16))

    for deadly in (3, 9):

        def kill(step, metrics, deadly=deadly):
            if step == deadly:
                raise Killed

        path = tmp_path / f"killed-{deadly}"
        with pytest.raises(Killed):
            run_stages(config, photos, store, path, show=kill)
        steps.clear()
        _, ended = run_stages(config, photos, store, path, resume=True, show=lambda step, metrics: steps.append(step))
        assert steps == list(range(deadly, 16))  # from the checkpoint, which is a step older
        assert ended == ["round 1", "final"]
        assert weights(path) == weights(tmp_path / "whole")
        records = RunFolder.reopen(path, keep=2).read_metrics()
        assert [record["step"] for record in records] == list(range(1, 16))
        assert {record["stage"] for record in records} == {0, 1}


def test_a_finished_stage_is_not_trained_again_but_a_damaged_one_is(encoder, photos, store, tmp_path):
    config, path, warned, steps = config_of(encoder), tmp_path / "run", [], []

    def count(step, metrics):
        steps.append(step)

    run_stages(config, photos, store, path)
    before = weights(path)
    run_stages(config, photos, store, path, resume=True, show=count)
    assert steps == []
    assert weights(path) == before
    outcome = path / "stages" / "round-1.safetensors"
    outcome.write_bytes(outcome.read_bytes()[:-100])
    run_stages(config, photos, store, path, resume=True, show=count, warned=warned)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert "computed again" in warned[0]
    assert weights(path) == before


def test_the_network_in_the_folder_is_the_one_returned(encoder, photos, store, tmp_path):
    net, _ = run_stages(config_of(encoder, self_training=SelfTrainingConfig(rounds=0)), photos, store, tmp_path / "run")
    again = load_saliency_net(tmp_path / "run")
    assert not net.training
    assert (again.arch, again.size) == ("resnet", 32)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("priors", [False, True])
def test_maps_of_priors_that_are_not_valid_change_nothing(encoder, photos, store, tmp_path, priors):
    config = config_of(
        encoder, priors, self_training=SelfTrainingConfig(rounds=0), optim=MaskOptimConfig(batch_size=3, epochs=1)
    )
    store.valid[2, 1] = store.valid[5] = False
    run_stages(config, photos, store, tmp_path / "zero")
    store.maps[2, 1] = store.maps[5] = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE))
    run_stages(config, photos, store, tmp_path / "junk")
    assert weights(tmp_path / "zero") == weights(tmp_path / "junk")


@pytest.mark.parametrize("priors", [False, True])
def test_a_network_sees_the_priors_that_made_its_labels_only_if_it_is_given_them(
    encoder, photos, store, tmp_path, priors
):
    """The labels are those of the maps as they were: a finished stage is not made again."""
    config = config_of(encoder, priors)

    def kill(step, metrics):
        raise Killed

    for path in (tmp_path / "same", tmp_path / "changed"):
        with pytest.raises(Killed):
            run_stages(config, photos, store, path, show=kill)
    run_stages(config, photos, store, tmp_path / "same", resume=True)
    store.maps[:] = store.maps[:, :, ::-1].copy()
    run_stages(config, photos, store, tmp_path / "changed", resume=True)
    assert (weights(tmp_path / "same") == weights(tmp_path / "changed")) is not priors


def test_an_image_without_any_prior_is_not_trained_on(encoder, photos, store, tmp_path):
    config = config_of(
        encoder, self_training=SelfTrainingConfig(rounds=0), optim=MaskOptimConfig(batch_size=3, epochs=1)
    )
    store.valid[[1, 4, 8]] = False  # as many as are dropped
    run_stages(config, photos, store, tmp_path / "one")
    changed = photos.images.clone()
    changed[[1, 4, 8]] = 255 - changed[[1, 4, 8]]
    run_stages(config, type(photos)(photos.indices, changed), store, tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_training_never_opens_a_true_mask(encoder, store, tmp_path, monkeypatch):
    """The embedded data know their masks; who trains does not even load the module that reads masks."""

    def refuse(*_):
        raise AssertionError("a true mask was opened")

    monkeypatch.setattr(ShapesDataset, "load_mask", refuse)
    assert importlib.util.find_spec("relicctl.bgmask.data")  # a renamed module would be no obstacle
    monkeypatch.setitem(sys.modules, "relicctl.bgmask.data", None)  # importing it fails
    source = ShapesDataset.from_spec(f"shapes:size={SIDE},train={COUNT}", "train")
    photos = load_resized_images(source, SIDE, workers=0, bad=BadImages(COUNT, 0.0))
    run_stages(config_of(encoder), photos, store, tmp_path / "run")
