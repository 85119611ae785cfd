"""Encoders in checkpoints of other projects: a ResNet's tensors under torchvision's names, wherever they lie.

Such a file may nest dictionaries (``state_dict``, ``model``, ``teacher``), put prefixes before the names (``module.``,
``encoder_q.``, ``backbone.``), and hold further networks, heads, queues and the state of an optimiser.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from relicctl.errors import UsageError

MAX_DEPTH = 5  # of nested dictionaries
SIGNS = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight")  # every ResNet has them
CLASSIFIER = {"fc.weight", "fc.bias"}  # of torchvision's own weights
HEADS = {"fc", "head", "classifier", "projector", "projection_head", "predictor", "prototypes"}
_TARGET = re.compile(r"encoder_k|teacher|target|momentum|ema")


def flatten_tensors(content: dict[Any, Any], depth: int = MAX_DEPTH) -> dict[str, Tensor]:
    """Return the tensors of nested dictionaries under dotted names; whatever else they hold is left out."""
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(name, str) and isinstance(value, dict) and depth > 1:
            tensors |= {f"{name}.{inner}": tensor for inner, tensor in flatten_tensors(value, depth - 1).items()}
    return tensors


def select_encoder_tensors(
    path: Path, tensors: dict[str, Tensor], network: str, warn: Callable[[str], None]
) -> dict[str, Tensor]:
    """Return the encoder's tensors by torchvision's names, without heads; ``warn`` of what was removed.

    Of several encoders in the file it is that of ``network``: online (query, student) or target (key, teacher).
    Returns {} if there is none. Raises UsageError where it is unclear which one is meant.
    """
    prefixes = [name.removesuffix(SIGNS[0]) for name in tensors if name.endswith(SIGNS[0])]
    prefixes = [prefix for prefix in prefixes if all(prefix + sign in tensors for sign in SIGNS)]
    prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    if len(prefixes) > 1:
        wanted = [prefix for prefix in prefixes if bool(_TARGET.search(prefix)) == (network == "target")]
        if len(wanted) != 1:
            what = f"{path} holds several encoders, and it is unclear which is meant: {', '.join(prefixes[:5])}."
            raise UsageError(what, "Save the tensors of one of them alone.")
        prefixes = wanted
    if not prefixes:
        return {}
    prefix = prefixes[0]
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    encoder = {name: tensor for name, tensor in named.items() if name.partition(".")[0] not in HEADS}
    others = len(tensors) - len(encoder)
    if prefix:
        warn(f"{path}: the encoder is what lies under {prefix!r}; {others} other tensors are left out")
    elif others > len(CLASSIFIER & tensors.keys()):
        warn(f"{path}: {others} tensors that are not the encoder's are left out")
    return encoder
