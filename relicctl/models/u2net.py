"""U2-Net and its small variant: a U of small Us (Qin et al., arXiv 2005.09007, figures 4 and 5, table 1).

Every stage is itself a residual U-block (RSU) that sees several scales at once; the decoder's stages and the
deepest one each give a side output, and a 1x1 convolution fuses the six. All outputs are logits: apply the sigmoid
for probabilities; losses are computed from logits, where they cannot overflow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A stage: height L of its U (0 = the dilated block RSU-4F), inner channels, output channels.
Stage = tuple[int, int, int]
ENCODERS: dict[str, tuple[Stage, ...]] = {
    "u2net": ((7, 32, 64), (6, 32, 128), (5, 64, 256), (4, 128, 512), (0, 256, 512), (0, 256, 512)),
    "u2netp": ((7, 16, 64), (6, 16, 64), (5, 16, 64), (4, 16, 64), (0, 16, 64), (0, 16, 64)),
}
DECODERS: dict[str, tuple[Stage, ...]] = {  # from the deepest, stage 5, to stage 1
    "u2net": ((0, 256, 512), (4, 128, 256), (5, 64, 128), (6, 32, 64), (7, 16, 64)),
    "u2netp": ((0, 16, 64), (4, 16, 64), (5, 16, 64), (6, 16, 64), (7, 16, 64)),
}


class U2Net(nn.Module):
    """[N, C, H, W] -> seven logits [N, 1, H, W]: the fused one, then the side outputs, finest first.

    ``arch``: ``u2net`` (44.0 M parameters) or ``u2netp`` (1.13 M). ``channels``: C, the image's three first.
    """

    def __init__(self, arch: str, channels: int = 3) -> None:
        super().__init__()
        encoder, decoder = ENCODERS[arch], DECODERS[arch]
        self.encoder = nn.ModuleList()
        for stage in encoder:
            self.encoder.append(RSU(channels, *stage))
            channels = stage[2]
        self.decoder = nn.ModuleList()
        for stage, skip_stage in zip(decoder, reversed(encoder[:-1]), strict=True):
            self.decoder.append(RSU(channels + skip_stage[2], *stage))
            channels = stage[2]
        side_channels = [stage[2] for stage in reversed(decoder)] + [encoder[-1][2]]
        self.sides = nn.ModuleList(nn.Conv2d(channels, 1, 3, padding=1) for channels in side_channels)
        self.fuse = nn.Conv2d(len(side_channels), 1, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        size = x.shape[-2:]
        levels: list[Tensor] = []
        for stage in self.encoder:
            x = stage(_downsample(x) if levels else x)
            levels.append(x)
        side_inputs = [levels.pop()]  # what gives a side output, finest first
        for stage in self.decoder:
            skip = levels.pop()
            side_inputs.insert(0, stage(torch.cat([upsample_to(side_inputs[0], skip.shape[-2:]), skip], 1)))
        sides = [upsample_to(side(x), size) for side, x in zip(self.sides, side_inputs, strict=True)]
        return [self.fuse(torch.cat(sides, 1)), *sides]


class RSU(nn.Module):
    """RSU-L: a U of L - 1 levels over a dilated bottom, added to its own input layer (figure 2e).

    With ``height`` 0 RSU-4F: of height 4, with dilation in place of pooling, for maps too small to be halved.
    """

    def __init__(self, channels: int, height: int, inner: int, out: int) -> None:
        super().__init__()
        self._pools = height > 0
        levels = list(enumerate([1] * (height - 1) if height else [1, 2, 4]))  # with their dilations
        self.enter = _build_conv(channels, out)
        self.down = nn.ModuleList(_build_conv(inner if k else out, inner, d) for k, d in levels)
        self.bottom = _build_conv(inner, inner, dilation=2 if height else 8)
        self.up = nn.ModuleList(_build_conv(2 * inner, inner if k else out, d) for k, d in reversed(levels))

    def forward(self, x: Tensor) -> Tensor:
        entered = x = self.enter(x)
        levels: list[Tensor] = []
        for convolution in self.down:
            x = convolution(_downsample(x) if levels and self._pools else x)
            levels.append(x)
        x = self.bottom(x)
        for convolution in self.up:
            level = levels.pop()
            x = convolution(torch.cat([upsample_to(x, level.shape[-2:]), level], 1))
        return torch.add(x, entered)


def _build_conv(channels: int, out: int, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=dilation, dilation=dilation), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


def _downsample(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, stride=2, ceil_mode=True)


def upsample_to(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Resize ``x`` bilinearly to ``size``; return it as it is if it has that size."""
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
