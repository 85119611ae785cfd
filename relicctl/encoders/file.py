"""The encoder as a file, and as the module that comes back from it.

A file of ours is safetensors with torchvision's tensor names; its metadata, all strings, say how to build the
network (arch, width, stem, padding) and how to prepare an image (size, crop_ratio, mean, std). Torchvision's
own ResNet weights can be read too, also those within checkpoints of other projects.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torchvision.models.resnet import Bottleneck

from relicctl.config.base import EncoderConfig
from relicctl.core.atomic_io import write_atomically
from relicctl.core.tensor_file import save_tensors
from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.data.crops import crop_on_host, make_eval_box
from relicctl.data.decoding import convert_to_rgb
from relicctl.encoders.foreign import flatten_tensors, select_encoder_tensors
from relicctl.errors import UsageError
from relicctl.models.resnet import ARCHITECTURES, ResNet, build_encoder
from relicctl.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "relicctl-encoder"
STATE_DICT_FIX = "Save the network's state_dict() alone, best as safetensors."
MAX_NAMED_TENSORS = 5  # in a message
FILE_FIX = "Give the folder of a finished run, its encoder.safetensors, or a torchvision ResNet's weights."


@dataclass(frozen=True)
class EvalTransform:
    """Prepare an image for an encoder: read as in training, centre square, resized (antialiased bicubic), normalised.

    Args:
        size: side in pixels of the result.
        crop_ratio: side of the centre square / the image's short side.
        mean: of each channel, RGB in [0, 1].
        std: of each channel.
        white_point: value of white in images of more than 8 bits; None: the largest of their type.
    """

    size: int
    crop_ratio: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    white_point: float | None = None

    def __call__(self, image: Image | np.ndarray) -> Tensor:
        """Return a PIL image of any mode or uint8 [H, W, 3] as float32 [3, size, size]; else ValueError.

        A PIL image becomes what the file's pixels are in training: upright by its EXIF orientation, transparency
        composited on white, 16 bits and floats scaled.
        """
        pixels = image if isinstance(image, np.ndarray) else convert_to_rgb(image, white_point=self.white_point)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"expected uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
        box = make_eval_box(pixels.shape[0], pixels.shape[1], self.crop_ratio)
        square = torch.from_numpy(crop_on_host(pixels, box[None], self.size)[0]).permute(2, 0, 1)
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (square / 255 - mean[:, None, None]) / std[:, None, None]


def save_encoder(path: Path, encoder: ResNet, metadata: dict[str, str]) -> None:
    """Write the encoder to ``path``, wholly or not at all; ``metadata``: size, crop_ratio, mean, std and more."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in encoder.state_dict().items()}
    all_metadata = {"version": __version__, **metadata, "format": FORMAT, **describe_network(encoder)}
    write_atomically(path, lambda temporary: save_tensors(temporary, tensors, all_metadata))


def describe_network(network: ResNet | EncoderConfig) -> dict[str, str]:
    """Return the metadata that say how to build a network."""
    return {name: str(getattr(network, name)) for name in EncoderConfig.model_fields}


def describe_transform(size: int = 224, crop_ratio: float = 0.875, white_point: float | None = None) -> dict[str, str]:
    """Return the metadata that say how to prepare an image."""
    mean, std = json.dumps(IMAGENET_MEAN), json.dumps(IMAGENET_STD)
    white = {} if white_point is None else {"white_point": str(white_point)}
    return {"size": str(size), "crop_ratio": str(crop_ratio), "mean": mean, "std": std, **white}


def load_encoder(
    path_or_run: str | Path, network: str = "online", warn: Callable[[str], None] = lambda text: None
) -> ResNet:
    """Load an encoder.

    Args:
        path_or_run: a run's folder, a file of ``save_encoder``, or torchvision's ResNet weights (safetensors or a
            torch file), whose classifier is left out; also in a checkpoint of another project, under a prefix.
        network: ``online`` or ``target``: the one that the file must hold.
        warn: gets a sentence where the encoder was found under a prefix or beside other tensors.

    Returns:
        A module in eval mode: normalised images [N, 3, s, s] -> features [N, ``feature_dim``]. Its ``transform``
        prepares one image (an ``EvalTransform``), its ``metadata`` say what it is.

    Raises:
        UsageError: there is no such file, it is damaged, could run foreign code, or does not fit: then the first
            missing, unexpected and misshapen tensors are named.
    """
    path = Path(path_or_run)
    if path.is_dir():
        path = path / "encoder.safetensors"
    if not path.is_file():
        raise UsageError(f"There are no encoder weights at {path}.", FILE_FIX)
    tensors, metadata = _read_weights(path)
    if not metadata.get("format", "").startswith("relicctl"):
        tensors = select_encoder_tensors(path, tensors, network, warn)
    if metadata.get("format") != FORMAT:
        metadata = _infer_torchvision_metadata(path, tensors)
        metadata |= {"network": network} if network == "target" else {}
    if metadata.get("network", network) != network:
        what = f"{path} holds the {metadata['network']} network's encoder, not the {network} network's."
        raise UsageError(what, "Give a file that holds it, or ask for the one that is there.")
    return build_encoder_from_tensors(tensors, metadata, path)


def build_encoder_from_tensors(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> ResNet:
    """Build the encoder that ``metadata`` describe, with ``tensors``; both were read from ``path``."""
    try:
        with torch.device("meta"):
            encoder = build_encoder(metadata["arch"], float(metadata["width"]), metadata["stem"], metadata["padding"])
        mean, std = (tuple(json.loads(metadata[name])) for name in ("mean", "std"))
        white = float(metadata["white_point"]) if "white_point" in metadata else None
        transform = EvalTransform(int(metadata["size"]), float(metadata["crop_ratio"]), mean, std, white)
        channels = {len(transform.mean), len(transform.std)}
        ranges_hold = transform.size >= 1 and 0 < transform.crop_ratio <= 1 and (white is None or 0 < white < math.inf)
        if not ranges_hold or channels != {3}:
            raise ValueError("it does not say how to prepare an image")
    except (KeyError, ValueError, TypeError, OverflowError) as reason:
        raise UsageError(f"The metadata of {path} are damaged ({reason}).", FILE_FIX) from None
    encoder.load_state_dict(_match_tensors(path, tensors, encoder), assign=True)
    vars(encoder).update(transform=transform, metadata=metadata)
    return encoder.eval()


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a safetensors file, or the tensors of a torch file."""
    with open(path, "rb") as handle:
        start = handle.read(9)
    if start[8:] != b"{":  # a safetensors file has its JSON header behind eight bytes of length, which may be any
        if start[:2] in (b"PK", b"\x80\x02"):  # the zip file that torch.save writes, and the pickle it used to
            return _read_torch(path), {}
        if start[:1] == b"\x80":
            _raise_pickle_error(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as reason:
        raise UsageError(f"{path} is truncated or no weights file ({reason}).", FILE_FIX) from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:  # by its content: given a path, torch would go by the name's ending
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:  # torch stores without compressing
                    is_compressed = sum(member.file_size for member in archive.infolist()) > size
                    is_script = any(name.endswith("/constants.pkl") for name in archive.namelist())
                if is_script:
                    raise UsageError(f"{path} is a TorchScript program, which is not run.", STATE_DICT_FIX)
                if is_compressed:
                    raise UsageError(f"{path} is a compressed torch file.", "Save it anew by torch.save.")
            file.seek(0)
            with torch.serialization.safe_globals([argparse.Namespace]):  # plain data that many trainings save
                content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        _raise_pickle_error(path)
    except UsageError:
        raise
    except Exception as reason:  # on damaged files torch raises almost anything
        said = (str(reason).strip().splitlines() or [type(reason).__name__])[0][:200]
        raise UsageError(f"{path} is truncated or no torch file ({said}).", FILE_FIX) from None
    tensors = flatten_tensors(content) if isinstance(content, dict) else {}
    if not tensors:
        raise UsageError(f"{path} is no dictionary of tensors.", STATE_DICT_FIX)
    return tensors


def _raise_pickle_error(path: Path) -> NoReturn:
    what = f"{path} is a pickle with more than tensors, and reading it could run foreign code."
    raise UsageError(what, STATE_DICT_FIX)


def _infer_torchvision_metadata(path: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Infer from names and shapes which torchvision ResNet ``tensors`` belong to."""
    depths = tuple(len({name.split(".")[1] for name in tensors if name.startswith(f"layer{k}.")}) for k in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in tensors
    stem = tensors.get("conv1.weight", torch.empty(0))
    for arch, (block, known_depths) in ARCHITECTURES.items():
        if known_depths == depths and (block is Bottleneck) == bottleneck and stem.shape[2:] == (7, 7):
            network = {"arch": arch, "width": str(stem.shape[0] / 64), "stem": "imagenet", "padding": "symmetric"}
            return {"format": "torchvision", **network, **describe_transform()}
    raise UsageError(f"{path} holds neither an encoder of relicctl nor a torchvision ResNet.", FILE_FIX)


def _match_tensors(path: Path, tensors: dict[str, Tensor], encoder: ResNet) -> dict[str, Tensor]:
    """Return ``tensors`` as float32, if they are exactly those of ``encoder``."""
    expected = encoder.state_dict()
    # older files lack BatchNorm's counters, and nothing here depends on them
    counters = {name: torch.zeros_like(t, device="cpu") for name, t in expected.items() if t.dtype == torch.int64}
    tensors = {**counters, **tensors}
    errors = [f"{name} is missing" for name in expected if name not in tensors]
    errors += [f"{name} is unexpected" for name in tensors if name not in expected]
    errors += [
        f"{name} is {list(tensors[name].shape)} instead of {list(t.shape)}"
        for name, t in expected.items()
        if name in tensors and tensors[name].shape != t.shape
    ]
    if errors:
        what = f"The tensors of {path} do not fit {encoder.arch}: {summarize_misfits(errors)}."
        raise UsageError(what, FILE_FIX)
    if any(t.numel() * t.element_size() > t.untyped_storage().nbytes() for t in tensors.values()):
        raise UsageError(f"{path} holds fewer numbers than its tensors claim.", "Save contiguous tensors.")
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def summarize_misfits(errors: list[str]) -> str:
    """Return the first of ``errors``, one for each tensor that does not fit, and how many more there are."""
    more = f" and {len(errors) - MAX_NAMED_TENSORS} more" if len(errors) > MAX_NAMED_TENSORS else ""
    return ", ".join(errors[:MAX_NAMED_TENSORS]) + more
