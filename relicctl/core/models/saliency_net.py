"""Networks that tell the object from its background: U2-Net, or a self-supervised ResNet with a light decoder.

All of them map normalised images [N, 3, H, W] to a list of logits [N, 1, H, W], the one to use first, then the
side outputs that are trained along with it (deep supervision). Further channels of the input are hints: maps of where
the object may be.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relicctl.core.models.resnet import ResNet
from relicctl.core.models.u2net import ENCODERS, U2Net, upsample_to

SALIENCY_ARCHITECTURES = (*ENCODERS, "resnet")
DECODER_CHANNELS = 64


class ResNetU(nn.Module):
    """A ResNet encoder, and a decoder that goes up its stages (a feature pyramid with a U's skips).

    The encoder's stages are brought to 64 channels each; from the deepest on, a level is enlarged, added to the
    next finer one and smoothed by a 3x3 convolution. The finest level is the stem's output. Hints go round the encoder,
    whose weights know images alone: at every level a 3x3 convolution of them is added.
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
        self.hints: nn.ModuleList | None = None
        if hints:
            self.hints = nn.ModuleList(nn.Conv2d(hints, DECODER_CHANNELS, 3, padding=1, bias=False) for _ in widths)

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
    """The outputs of the stem and of the four stages, finest first; the stem's only where it is finer."""
    stem = encoder.relu(encoder.bn1(encoder.conv1(x)))
    levels, x = [stem], encoder.maxpool(stem)
    for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        x = stage(x)
        levels.append(x)
    return levels if levels[1].shape[-2:] != stem.shape[-2:] else levels[1:]


def build_saliency_net(arch: str, encoder: ResNet | None = None, hints: int = 0) -> nn.Module:
    """A randomly initialised network, except for the ``encoder`` that arch ``resnet`` starts from.

    ``hints``: how many channels of the input follow the image's three.

    Draws from torch's default CPU generator: wrap the call in ``seeded``. ValueError for an unknown arch.
    """
    if arch in ENCODERS:
        return U2Net(arch, 3 + hints)
    if arch != "resnet" or encoder is None:
        raise ValueError(
            f"arch is one of {', '.join(SALIENCY_ARCHITECTURES)}, and resnet needs an encoder; not {arch!r}"
        )
    return ResNetU(encoder, hints)
