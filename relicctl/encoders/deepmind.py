"""Encoders from the checkpoints that ReLICv2's authors published, and BYOL's, which have the same form.

Such a file is a pickle of ``{experiment_state: {online_params, online_state, ...}, step, rng}``, where the
experiment's state may also be a named tuple. ``online_params`` and ``online_state`` are Haiku's: module name ->
parameter name -> array, with the ResNet's modules among others. Arrays may have a leading device axis, of which
the first is taken, as the authors do (github.com/deepmind/relicv2, eval_experiment.py).

Their network is ours with ``padding: same``: ResNet v1, stride on the 3x3, TensorFlow's SAME padding, BatchNorm
with eps 1e-5. Convolutions are stored [height, width, in, out], ours are [out, in, height, width].
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck

from relicctl.encoders.file import describe_transform, summarize_misfits
from relicctl.encoders.safe_pickle import OpaqueInstance, load_pickle
from relicctl.errors import UsageError
from relicctl.models.resnet import ARCHITECTURES, build_encoder

FIX = "Give a pretraining checkpoint of deepmind/relicv2 or of deepmind-research/byol."
HaikuTree = dict[str, Any]  # module name -> parameter name -> array


def read_deepmind(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the online encoder's state dict (float32, torchvision's names, no ``fc``) and its metadata.

    Images are prepared as in the authors' evaluation. UsageError if the pickle asks for what it should not, or
    holds no whole ResNet v1: then the first tensors that do not fit are named.
    """
    params, state = _extract_online(path, load_pickle(path))
    arrays = {**_flatten_arrays(params), **_flatten_arrays(state)}
    prefix, arch, channels = _find_architecture(path, arrays)
    width = channels / 64
    with torch.device("meta"):
        expected = build_encoder(arch, width, padding="same").state_dict()

    names = {name: prefix + _to_haiku_name(name) for name in expected if not name.endswith("num_batches_tracked")}
    tensors, errors = {}, []
    for name, expected_tensor in expected.items():
        array = arrays.get(names.get(name, ""))
        if name not in names:
            tensors[name] = torch.zeros_like(expected_tensor, device="cpu")  # nothing here depends on the count
        elif not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            errors.append(f"{names[name]} is {'missing' if array is None else 'no array of floats'}")
        else:
            array = array[0] if array.ndim == 5 and len(array) else array  # without a device axis there are four
            converted = array.transpose(3, 2, 0, 1) if array.ndim == expected_tensor.ndim == 4 else array.reshape(-1)
            if converted.shape != expected_tensor.shape:
                errors.append(f"{names[name]} is {list(array.shape)}, not fit for {list(expected_tensor.shape)}")
            else:
                tensors[name] = torch.from_numpy(np.array(converted, dtype=np.float32, order="C"))
    known = {*names.values(), f"{prefix}logits w", f"{prefix}logits b"}
    known |= {key.replace(" average", f" {other}") for key in known for other in ("counter", "hidden")}
    errors += [f"{key} is unexpected" for key in arrays if key.startswith(prefix) and key not in known]
    if errors:
        listed = ascii(summarize_misfits(errors))[1:-1]  # names from a file may hold anything
        raise UsageError(f"The tensors of {path} do not fit {arch} of width {width:g}: {listed}.", FIX)
    network = {"arch": arch, "width": str(width), "stem": "imagenet", "padding": "same"}
    return tensors, {**network, **describe_transform(), "network": "online"}


def _extract_online(path: Path, content: Any) -> tuple[HaikuTree, HaikuTree]:
    """Return parameters and state of the online network, heads included."""
    experiment = content.get("experiment_state") if isinstance(content, dict) else None
    if isinstance(experiment, OpaqueInstance):
        experiment = _extract_fields(experiment)
    if isinstance(experiment, dict):
        params, state = experiment.get("online_params"), experiment.get("online_state")
        if isinstance(params, dict) and isinstance(state, dict):
            return params, state
    raise UsageError(f"{path} has no experiment_state with online_params and online_state.", FIX)


def _extract_fields(experiment: OpaqueInstance) -> HaikuTree:
    """Return the fields of a named tuple or dataclass by name.

    Where the pickle gives values alone, the first one that has a stem is the online parameters and the first with
    moving averages the online state: they come before the target's.
    """
    if isinstance(experiment.state, dict):
        return experiment.state
    if experiment.type.fields:
        return dict(zip(experiment.type.fields, experiment.args, strict=False))
    trees = [tree for tree in experiment.args if isinstance(tree, dict)]
    params = (tree for tree in trees if any("initial_conv" in str(module) for module in tree))
    states = (tree for tree in trees if any("mean_ema" in str(module) for module in tree))
    return {"online_params": next(params, None), "online_state": next(states, None)}


def _flatten_arrays(tree: HaikuTree) -> dict[str, Any]:
    """Turn ``{"net/~/initial_conv": {"w": array}}`` into ``{"net/initial_conv w": array}``, without Haiku's ``~``."""
    return {
        f"{str(module).replace('~/', '')} {name}": array
        for module, parameters in tree.items()
        if isinstance(parameters, dict)
        for name, array in parameters.items()
    }


def _find_architecture(path: Path, arrays: dict[str, Any]) -> tuple[str, str, int]:
    """Return the prefix of the ResNet's names, arch, and the stem's channels."""
    stems = [key for key in arrays if re.fullmatch(r"(.*/)?initial_conv w", key)]
    if len(stems) == 1:
        stem, prefix = arrays[stems[0]], stems[0].removesuffix("initial_conv w")
        blocks = [re.fullmatch(r"block_group_(\d)/block_\d+/conv_0 w", key.removeprefix(prefix)) for key in arrays]
        groups = [block[1] for block in blocks if block]
        bottleneck = f"{prefix}block_group_0/block_0/conv_2 w" in arrays
        version_1 = f"{prefix}initial_batchnorm scale" in arrays
        for arch, (block, depths) in ARCHITECTURES.items():
            fits = depths == tuple(map(groups.count, "0123")) and (block is Bottleneck) == bottleneck and version_1
            if fits and isinstance(stem, np.ndarray) and stem.ndim in (4, 5) and stem.size:
                return prefix, arch, stem.shape[-1]
    raise UsageError(f"The online network of {path} is no ResNet v1 of a known depth.", FIX)


def _to_haiku_name(name: str) -> str:
    """``layer1.0.conv2.weight`` -> ``block_group_0/block_0/conv_1 w``."""
    module, parameter = name.rsplit(".", 1)
    match = re.fullmatch(r"layer(\d)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01]))", module)
    if match is None:
        module = {"conv1": "initial_conv", "bn1": "initial_batchnorm"}[module]
    else:
        stage, block, kind, number, shortcut = match.groups()
        layer = "conv" if kind == "conv" or shortcut == "0" else "batchnorm"
        layer = f"{layer}_{int(number) - 1}" if number else f"shortcut_{layer}"
        module = f"block_group_{int(stage) - 1}/block_{block}/{layer}"
    if "batchnorm" not in module:
        return f"{module} w"
    parts = {"weight": " scale", "bias": " offset"}
    return module + (parts.get(parameter) or f"/{parameter.removeprefix('running_')}_ema average")
