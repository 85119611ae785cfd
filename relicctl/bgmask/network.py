"""The mask network: U2-Net, or a ResNet encoder with a light decoder; and its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from relicctl.bgmask.priors.maps import PRIOR_NAMES
from relicctl.config.bgmask import BgmaskConfig, MaskNetworkConfig
from relicctl.core.atomic_io import write_atomically
from relicctl.core.counter_rng import Stream, derive_seed, fork_seeded_rng
from relicctl.core.tensor_file import save_tensors
from relicctl.encoders.file import load_encoder
from relicctl.errors import UsageError
from relicctl.models.resnet import ResNet, build_encoder
from relicctl.models.u2net import ENCODERS, U2Net, upsample_to
from relicctl.version import __version__

FORMAT = "relicctl-saliency"
SALIENCY_FILE_NAME = "saliency.safetensors"
FILE_FIX = "Give a finished run of train-bgmask, or its saliency.safetensors."
DECODER_CHANNELS = 64


class SaliencyNet(nn.Module):
    """Map normalised images ``[N, 3, H, W]`` to several logits ``[N, 1, H, W]``; the first is the prediction.

    ``size``: side in pixels of the square images it was trained on. ``hints``: number of input channels after the
    image's three, the prior maps. ``metadata``: strings from which it can be rebuilt; of a loaded network, all that
    its file holds.
    """

    def __init__(self, arch: str, size: int, encoder: ResNet | None = None, hints: int = 0) -> None:
        super().__init__()
        self.arch, self.size, self.hints = arch, size, hints
        self.metadata = {"format": FORMAT, "arch": arch, "size": str(size), "version": __version__}
        if encoder is not None:
            for name in ("arch", "width", "stem", "padding"):
                self.metadata[f"encoder_{name}"] = str(getattr(encoder, name))
        if hints:
            self.metadata["hints"] = str(hints)
        self.body = build_saliency_net(arch, encoder, hints)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.body(x))


def init_saliency_net(
    config: BgmaskConfig, stage: int = 0, warn: Callable[[str], None] = lambda text: None
) -> SaliencyNet:
    """Return the network of a ``stage``, initialised from the seed and the weights ``model.init_encoder`` alone.

    ``warn`` gets a sentence where these lie under a prefix in their file.
    Raises UsageError when these cannot be read, or were trained with labels.
    """
    model = config.model
    with fork_seeded_rng(derive_seed(config.seed, Stream.INIT, stage)):
        encoder = _init_encoder(model, warn) if model.arch == "resnet" else None
        return SaliencyNet(model.arch, model.size, encoder, len(PRIOR_NAMES) if model.prior_channels else 0)


def _init_encoder(model: MaskNetworkConfig, warn: Callable[[str], None]) -> ResNet:
    if model.init_encoder is None:
        return build_encoder("resnet18")
    encoder = load_encoder(model.init_encoder, warn=warn)
    if vars(encoder)["metadata"].get("objective") == "supervised":
        what = f"{model.init_encoder} was trained with labels, and masks must not depend on any."
        raise UsageError(what, "Give --init-from a run of another objective.")
    return encoder


def save_saliency_net(path: Path, net: SaliencyNet) -> None:
    """Write the network to ``path``, wholly or not at all."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in net.body.state_dict().items()}
    write_atomically(path, lambda temporary: save_tensors(temporary, tensors, net.metadata))


def load_saliency_net(path_or_run: str | Path) -> SaliencyNet:
    """Load a trained network, in eval mode, from a run's folder or a file of ``save_saliency_net``.

    Raises UsageError when there is none, or it is damaged.
    """
    path = Path(path_or_run)
    path = path / SALIENCY_FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"There is no mask network at {path}.", FILE_FIX)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UsageError(f"{path} holds no mask network of relicctl.", FILE_FIX)
            # copied: their alignment in the file would change the last bit of what is computed
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        net = _build_from_metadata(metadata)
        net.body.load_state_dict(tensors, assign=True)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as reason:
        raise UsageError(f"{path} is truncated or damaged ({reason}).", FILE_FIX) from None
    net.metadata = metadata
    return net.eval()


def _build_from_metadata(metadata: dict[str, str]) -> SaliencyNet:
    """Build the network that ``metadata`` describe, without weights."""
    encoder = None
    if metadata["arch"] == "resnet":
        arch, width, stem, padding = (metadata[f"encoder_{name}"] for name in ("arch", "width", "stem", "padding"))
        encoder = build_encoder(arch, float(width), stem, padding)
    net = SaliencyNet(metadata["arch"], int(metadata["size"]), encoder, int(metadata.get("hints", 0)))
    return net.to(torch.device("meta"))


class ResNetU(nn.Module):
    """A ResNet encoder, and a decoder that goes up its stages (a feature pyramid with a U's skips).

    The encoder's stages are projected to 64 channels each; from the deepest on, a level is upsampled, added to the
    next finer one and smoothed by a 3x3 convolution. The finest level is the stem's output. Prior maps (hints) bypass
    the encoder, whose weights were trained on images alone: at every level a 3x3 convolution of them is added.
    """

    def __init__(self, encoder: ResNet, hints: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            widths = [level.shape[1] for level in _extract_levels(encoder, torch.zeros(2, 3, 64, 64))]
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, DECODER_CHANNELS, 1, bias=False), nn.BatchNorm2d(DECODER_CHANNELS))
            for width in widths
        )
        self.smooth = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(DECODER_CHANNELS, DECODER_CHANNELS, 3, padding=1, bias=False),
                nn.BatchNorm2d(DECODER_CHANNELS),
                nn.ReLU(inplace=True),
            )
            for _ in widths
        )
        self.sides = nn.ModuleList(nn.Conv2d(DECODER_CHANNELS, 1, 1) for _ in widths)
        bypass = (nn.Conv2d(hints, DECODER_CHANNELS, 3, padding=1, bias=False) for _ in widths)
        self.hints = nn.ModuleList(bypass) if hints else None

    def forward(self, x: Tensor) -> list[Tensor]:
        size = x.shape[-2:]
        levels = _extract_levels(self.encoder, x[:, :3])
        outputs: list[Tensor] = []
        above: Tensor | None = None
        for k in reversed(range(len(levels))):
            level = self.lateral[k](levels[k])
            if self.hints is not None:
                level = level + self.hints[k](F.interpolate(x[:, 3:], size=level.shape[-2:], mode="area"))
            if above is not None:
                level = level + upsample_to(above, level.shape[-2:])
            above = self.smooth[k](level)
            outputs.insert(0, upsample_to(self.sides[k](above), size))
        return outputs


def _extract_levels(encoder: ResNet, x: Tensor) -> list[Tensor]:
    """Return the outputs of the stem and the four stages, finest first; the stem's only where it is finer."""
    stem = encoder.relu(encoder.bn1(encoder.conv1(x)))
    levels, x = [stem], encoder.maxpool(stem)
    for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        x = stage(x)
        levels.append(x)
    return levels if levels[1].shape[-2:] != stem.shape[-2:] else levels[1:]


def build_saliency_net(arch: str, encoder: ResNet | None = None, hints: int = 0) -> nn.Module:
    """Build a randomly initialised network, except for the ``encoder`` that arch ``resnet`` starts from.

    ``hints``: number of input channels after the image's three. Draws from torch's default CPU generator: wrap the
    call in ``fork_seeded_rng``. Raises ValueError for an unknown arch.
    """
    if arch in ENCODERS:
        return U2Net(arch, 3 + hints)
    if arch != "resnet" or encoder is None:
        raise ValueError(f"arch is one of {', '.join(ENCODERS)}, resnet, and resnet needs an encoder; not {arch!r}")
    return ResNetU(encoder, hints)
