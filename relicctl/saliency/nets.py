"""The mask network as a file, and as the module that comes back from it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from relicctl import __version__
from relicctl.config.bgmask import BgmaskConfig, MaskNetworkConfig
from relicctl.core.checkpoint import write_atomically
from relicctl.core.counted import Stream, derive_seed
from relicctl.core.models.resnet import ResNet, build_encoder, fork_seeded_rng
from relicctl.core.models.saliency_net import build_saliency_net
from relicctl.encoder import load_encoder
from relicctl.errors import UsageError
from relicctl.saliency.priors import PRIOR_NAMES

FORMAT = "relicctl-saliency"
SALIENCY_FILE_NAME = "saliency.safetensors"
FILE_FIX = "Give a finished run of train-bgmask, or its saliency.safetensors."


class SaliencyNet(nn.Module):
    """Normalised images ``[N, 3, H, W]`` -> logits ``[N, 1, H, W]``, the one to use first.

    ``size``: side in pixels of the squashed images it was trained on. ``hints``: how many channels of the input follow
    the image's, the priors' maps (``saliency.hints``). ``metadata``: strings that say how to build it again; of a
    loaded network also what its file says besides.
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
        return self.body(x)


def init_saliency_net(config: BgmaskConfig, stage: int = 0) -> SaliencyNet:
    """The network of a training's ``stage``, initialised as a pure function of the seed, and of the weights that
    ``model.encoder`` names.

    Raises UsageError when these cannot be read, or labels went into them: masks never see any.
    """
    model = config.model
    with fork_seeded_rng(derive_seed(config.seed, Stream.INIT, stage)):
        encoder = _init_encoder(model) if model.arch == "resnet" else None
        return SaliencyNet(model.arch, model.size, encoder, len(PRIOR_NAMES) if model.priors else 0)


def _init_encoder(model: MaskNetworkConfig) -> ResNet:
    if model.encoder is None:
        return build_encoder("resnet18")
    encoder = load_encoder(model.encoder)
    if vars(encoder)["metadata"].get("objective") == "supervised":
        raise UsageError(
            f"{model.encoder} was trained with labels, and masks are made without any.",
            "Give --init-from a run of another objective.",
        )
    return encoder


def save_saliency_net(path: Path, net: SaliencyNet) -> None:
    """Write the network to ``path``, wholly or not at all."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in net.body.state_dict().items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=net.metadata))


def load_saliency_net(path_or_run: str | Path) -> SaliencyNet:
    """A trained network in eval mode, from a run's folder or a file of ``save_saliency_net``.

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
            # copied: where in the file they lie decides their alignment, and that the last bit of what is computed
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        net = _build_from_metadata(metadata)
        net.body.load_state_dict(tensors, assign=True)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as reason:
        raise UsageError(f"{path} is truncated or damaged ({reason}).", FILE_FIX) from None
    net.metadata = metadata
    return net.eval()


def _build_from_metadata(metadata: dict[str, str]) -> SaliencyNet:
    """The network that ``metadata`` describe, without weights."""
    encoder = None
    if metadata["arch"] == "resnet":
        arch, width, stem, padding = (metadata[f"encoder_{name}"] for name in ("arch", "width", "stem", "padding"))
        encoder = build_encoder(arch, float(width), stem, padding)
    net = SaliencyNet(metadata["arch"], int(metadata["size"]), encoder, int(metadata.get("hints", 0)))
    return net.to(torch.device("meta"))
