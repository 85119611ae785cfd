"""The law: an encoder read from a Haiku checkpoint gives Haiku's own features."""

from __future__ import annotations

import pickle
import sys
import types
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relicctl.encoders.deepmind import read_deepmind
from relicctl.errors import UsageError
from relicctl.models.resnet import build_encoder

TOLERANCE = 1e-5


def write(path: Path, params: Any, state: Any) -> Path:
    experiment = {"online_params": params, "online_state": state, "opt_state": None}
    path.write_bytes(pickle.dumps({"experiment_state": experiment, "step": 7, "rng": np.zeros(2, np.uint32)}, 2))
    return path


def tree_map(change, tree):
    return {module: {name: change(array) for name, array in arrays.items()} for module, arrays in tree.items()}


def haiku_resnet(depth: int, width: int):
    """The authors' torso, made of Haiku's own parts: hk.nets.ResNet up to the mean over space."""
    import haiku as hk
    import jax

    config = hk.nets.ResNet.CONFIGS[depth]

    def features(images, is_training):
        channels = tuple(width * number for number in config["channels_per_group"])
        net = hk.nets.ResNet(
            **{**config, "channels_per_group": channels},
            num_classes=1,
            initial_conv_config={"output_channels": 64 * width},
            name=f"res_net{depth}",
        )
        net.logits = lambda pooled: pooled
        return net(images, is_training)

    network = hk.without_apply_rng(hk.transform_with_state(features))
    init = partial(network.init, is_training=True)  # moving averages are made in training alone
    return init, jax.jit(partial(network.apply, is_training=False))


def haiku_checkpoint(depth: int, width: int, size: int, seed: int = 0):
    """Random parameters, BatchNorm's included, with the features that Haiku gives to random images."""
    import jax

    rng = np.random.default_rng(seed)
    init, apply = haiku_resnet(depth, width)
    shapes = jax.eval_shape(init, jax.random.PRNGKey(0), np.zeros((1, size, size, 3), np.float32))

    def draw(module: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name == "w":
            return rng.normal(0, np.sqrt(2 / np.prod(shape[:3])), shape)
        if name == "scale":  # the last of a block small, so that the sum over 50 blocks stays of one size
            return rng.uniform(0.1, 0.3, shape) if module.endswith("batchnorm_2") else rng.uniform(0.5, 1.5, shape)
        if name == "average" and module.endswith("var_ema"):
            return rng.uniform(0.5, 2, shape)
        return rng.normal(0, 0.3, shape) if shape else np.array(7)

    params, state = (
        {m: {n: draw(m, n, like.shape).astype(like.dtype) for n, like in arrays.items()} for m, arrays in tree.items()}
        for tree in shapes
    )
    images = (rng.normal(0, 1, (2, size, size, 3)) * [[[[0.3]]], [[[2]]]]).astype(np.float32)
    return params, state, images, np.array(apply(params, state, images)[0])


@torch.inference_mode()
def features(path: Path, images: np.ndarray, padding: str | None = None) -> np.ndarray:
    """``images`` [N, H, W, 3] through what was read from ``path``."""
    tensors, metadata = read_deepmind(path)
    encoder = build_encoder(
        metadata["arch"], float(metadata["width"]), metadata["stem"], padding or metadata["padding"]
    ).eval()
    encoder.load_state_dict(tensors, strict=True)
    return encoder(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, beside the largest that the feature has between the two images."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs[0] - theirs[1]).max())


@pytest.mark.parametrize(
    ("depth", "width", "size"),
    [
        (50, 1, 64),
        pytest.param(50, 1, 75, marks=pytest.mark.slow),  # odd sizes pad on both sides
        pytest.param(50, 2, 64, marks=pytest.mark.slow),
        pytest.param(101, 1, 64, marks=pytest.mark.slow),
        pytest.param(200, 1, 64, marks=pytest.mark.slow),
    ],
)
def test_features_are_those_of_haiku(depth, width, size, tmp_path):
    pytest.importorskip("haiku")
    params, state, images, theirs = haiku_checkpoint(depth, width, size)
    path = write(tmp_path / "plain.pkl", params, state)
    assert theirs.shape == (2, 2048 * width)
    assert relative(features(path, images), theirs) < TOLERANCE
    if size % 2 == 0:
        assert relative(features(path, images, "symmetric"), theirs) > 1000 * TOLERANCE  # the padding is what does it

    metadata = read_deepmind(path)[1]
    assert (metadata["arch"], float(metadata["width"]), metadata["padding"]) == (f"resnet{depth}", width, "same")


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    """Parameters and state of a ResNet-50 of width 1/8 under Haiku's names, heads beside it."""
    rng = np.random.default_rng(1)
    params: dict[str, dict[str, np.ndarray]] = {}
    state: dict[str, dict[str, np.ndarray]] = {}

    def layer(conv: str, norm: str, kernel: int, into: int, out: int) -> None:
        params[conv] = {"w": rng.normal(size=(kernel, kernel, into, out)).astype(np.float32)}
        params[norm] = {name: rng.normal(size=(1, 1, 1, out)).astype(np.float32) for name in ("scale", "offset")}
        for moment in ("mean", "var"):
            average, hidden = rng.uniform(1, 2, (2, 1, 1, 1, out)).astype(np.float32)
            state[f"{norm}/~/{moment}_ema"] = {"average": average, "hidden": hidden, "counter": np.array(3)}

    net, into = "res_net50/~", 8
    layer(f"{net}/initial_conv", f"{net}/initial_batchnorm", 7, 3, 8)
    for group, blocks in enumerate((3, 4, 6, 3)):
        inner = 8 * 2**group
        for number in range(blocks):
            block = f"{net}/block_group_{group}/~/block_{number}/~"
            if number == 0:
                layer(f"{block}/shortcut_conv", f"{block}/shortcut_batchnorm", 1, into, 4 * inner)
            for at, (kernel, a, b) in enumerate([(1, into, inner), (3, inner, inner), (1, inner, 4 * inner)]):
                layer(f"{block}/conv_{at}", f"{block}/batchnorm_{at}", kernel, a, b)
            into = 4 * inner
    params["projector/linear"] = {"w": np.ones((256, 16), np.float32), "b": np.ones(16, np.float32)}
    params["predictor/linear"] = {"w": np.ones((16, 16), np.float32)}
    state["projector/batch_norm/~/mean_ema"] = {"average": np.ones(16, np.float32)}
    return params, state


def test_what_each_tensor_becomes(small, tmp_path):
    params, state = small
    tensors, metadata = read_deepmind(write(tmp_path / "c.pkl", params, state))
    block = "res_net50/~/block_group_1/~/block_0/~"
    for name, array in {
        "conv1.weight": params["res_net50/~/initial_conv"]["w"].transpose(3, 2, 0, 1),
        "bn1.running_var": state["res_net50/~/initial_batchnorm/~/var_ema"]["average"].ravel(),
        "layer2.0.conv2.weight": params[f"{block}/conv_1"]["w"].transpose(3, 2, 0, 1),
        "layer2.0.bn3.weight": params[f"{block}/batchnorm_2"]["scale"].ravel(),
        "layer2.0.bn3.bias": params[f"{block}/batchnorm_2"]["offset"].ravel(),
        "layer2.0.bn3.running_mean": state[f"{block}/batchnorm_2/~/mean_ema"]["average"].ravel(),
        "layer2.0.downsample.0.weight": params[f"{block}/shortcut_conv"]["w"].transpose(3, 2, 0, 1),
        "layer2.0.downsample.1.weight": params[f"{block}/shortcut_batchnorm"]["scale"].ravel(),
    }.items():
        np.testing.assert_array_equal(tensors[name].numpy(), array)
    encoder = build_encoder("resnet50", 1 / 8, padding="same")
    encoder.load_state_dict(tensors, strict=True)
    assert metadata == {
        "arch": "resnet50",
        "width": "0.125",
        "stem": "imagenet",
        "padding": "same",
        "size": "224",
        "crop_ratio": "0.875",
        "mean": "[0.485, 0.456, 0.406]",
        "std": "[0.229, 0.224, 0.225]",
        "network": "online",
    }


def same(first: Path, second: Path) -> bool:
    (ours, metadata), (others, other_metadata) = read_deepmind(first), read_deepmind(second)
    return metadata == other_metadata and all(torch.equal(ours[name], others[name]) for name in ours | others)


def test_a_device_axis_and_a_foreign_byte_order_change_nothing(small, tmp_path):
    params, state = small
    plain = write(tmp_path / "plain.pkl", params, state)
    # another device's copy differs, so that it shows which one is taken
    devices = [tree_map(lambda a: np.stack([a, a + 1]), tree) for tree in small]
    assert same(plain, write(tmp_path / "devices.pkl", *devices))
    big_endian = [tree_map(lambda a: a.astype(a.dtype.newbyteorder(">")), tree) for tree in small]
    assert same(plain, write(tmp_path / "big.pkl", *big_endian))


@pytest.mark.parametrize("writer", ["pickle", "dill"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_the_state_may_be_a_named_tuple_of_an_absent_module(writer, protocol, small, tmp_path, monkeypatch):
    dumps = pytest.importorskip(writer).dumps
    params, state = small
    plain = write(tmp_path / "plain.pkl", params, state)
    fields = ["online_params", "target_params", "online_state", "target_state", "opt_state"]
    kind = namedtuple("_ExperimentState", fields, module="byol_experiment")
    module = types.ModuleType("byol_experiment")
    module._ExperimentState = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "byol_experiment", module)
    target = [tree_map(lambda a: a + 1, tree) for tree in small]
    content = kind(params, target[0], state, target[1], (1, None))
    (tmp_path / "tuple.pkl").write_bytes(dumps({"experiment_state": content, "step": 1, "rng": None}, protocol))
    monkeypatch.delitem(sys.modules, "byol_experiment")
    assert same(plain, tmp_path / "tuple.pkl")


def test_trees_may_be_of_haiku_s_own_mapping_and_arrays_of_jax(small, tmp_path):
    structures = pytest.importorskip("haiku._src.data_structures")
    jnp = pytest.importorskip("jax.numpy")
    params, state = small
    plain = write(tmp_path / "plain.pkl", params, state)
    theirs = [structures.to_immutable_dict(tree_map(jnp.asarray, tree)) for tree in small]
    assert type(theirs[0]) is structures.FlatMap
    assert same(plain, write(tmp_path / "theirs.pkl", *theirs))


def changed(small, change) -> tuple[Any, Any]:
    params, state = ({module: dict(arrays) for module, arrays in tree.items()} for tree in small)
    change(params, state)
    return params, state


def failure(path: Path) -> str:
    with pytest.raises(UsageError) as error:
        read_deepmind(path)
    return error.value.what


def test_every_tensor_that_does_not_fit_is_named(small, tmp_path):
    def change(params, state):
        del params["res_net50/~/block_group_0/~/block_0/~/conv_1"]
        params["res_net50/~/initial_conv"]["b"] = np.zeros(8, np.float32)
        params["res_net50/~/block_group_3/~/block_2/~/batchnorm_0"]["scale"] = np.zeros(3, np.float32)
        params["res_net50/~/block_group_3/~/block_2/~/conv_0"]["w"] = np.zeros((0, 1, 1, 1, 1), np.float32)
        state["res_net50/~/initial_batchnorm/~/var_ema"]["average"] = "text"

    what = failure(write(tmp_path / "c.pkl", *changed(small, change)))
    assert "do not fit resnet50 of width 0.125" in what
    for clause in (
        "res_net50/block_group_0/block_0/conv_1 w is missing",
        "res_net50/initial_conv b is unexpected",
        "res_net50/block_group_3/block_2/batchnorm_0 scale is [3], not fit for [64]",
        "res_net50/block_group_3/block_2/conv_0 w is [0, 1, 1, 1, 1]",
        "res_net50/initial_batchnorm/var_ema average is no array of floats",
    ):
        assert clause in what


def test_other_networks_are_refused(small, tmp_path):
    def version_2(params, state):
        params["res_net50/~/final_batchnorm"] = params.pop("res_net50/~/initial_batchnorm")

    def deeper(params, state):
        params["res_net50/~/block_group_0/~/block_3/~/conv_0"] = {"w": np.zeros((1, 1, 32, 8), np.float32)}

    def two(params, state):
        params["another/~/initial_conv"] = params["res_net50/~/initial_conv"]

    def empty(params, state):
        params["res_net50/~/initial_conv"]["w"] = np.zeros((0, 7, 7, 3, 2**40), np.float32)

    for change in (version_2, deeper, two, empty, lambda params, state: params.clear()):
        assert "no ResNet v1 of a known depth" in failure(write(tmp_path / "c.pkl", *changed(small, change)))


@pytest.mark.parametrize(
    "content",
    [[], {}, {"experiment_state": None}, {"experiment_state": {"online_params": {}}}, {"online_params": {}}],
)
def test_a_pickle_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(content))
    assert "no experiment_state with online_params" in failure(tmp_path / "c.pkl")


def test_the_command_turns_an_authors_file_into_other_forms(small, tmp_path, capsys):
    """``--from deepmind``: relicctl's own form is exact; a form without its padding says what that costs."""
    from relicctl.cli import run
    from relicctl.encoders.file import load_encoder

    file = write(tmp_path / "weights.pkl", *small)
    own, stock = tmp_path / "own.safetensors", tmp_path / "stock"
    assert run(["export", str(file), "--from", "deepmind", "--format", "relicctl", "--out", str(own)]) == 0
    assert run(["export", str(file), "--from", "deepmind", "--format", "transformers", "--out", str(stock)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{own}\n{stock}\n"
    assert "mean relative difference" in captured.err
    expected = read_deepmind(file)[0]
    encoder = load_encoder(own)
    assert encoder.padding == "same"
    assert all(torch.equal(t, expected[name]) for name, t in encoder.state_dict().items())
