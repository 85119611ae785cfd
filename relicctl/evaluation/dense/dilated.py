"""An encoder's last stage at full density: its stride is taken out, and its kernels are dilated instead.

The usual surgery for segmentation (DeepLab, arXiv 1606.00915; BYOL, arXiv 2006.07733, appendix D): with the ImageNet
stem the features come 16 pixels apart, not 32. No weight changes its name, its shape or its meaning: at even rows and
columns the dense features are those of the encoder as it was, to the last bit but rounding.
"""

from __future__ import annotations

import copy
import math
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from relicctl.core.models.resnet import STEMS, ResNet


def dilate_last_stage(encoder: ResNet) -> ResNet:
    """A copy of ``encoder`` whose last stage has stride 1, and dilation 2 behind its first convolution."""
    encoder = copy.deepcopy(encoder)
    strided_before = False
    for block in encoder.layer4:
        for name, conv in list(block.named_children()):
            if not isinstance(conv, nn.Conv2d) or conv.kernel_size == (1, 1):
                continue
            if conv.stride == (2, 2):
                setattr(block, name, _remove_stride(conv))
                strided_before = True
            elif strided_before:
                conv.dilation, conv.padding = (2, 2), (2, 2)
        if block.downsample is not None:
            cast(nn.Conv2d, cast(nn.Sequential, block.downsample)[0]).stride = (1, 1)
    return encoder


def get_output_stride(encoder: ResNet) -> int:
    """Pixels between two features of ``dilated(encoder)``."""
    pooled = 1 if isinstance(encoder.maxpool, nn.Identity) else 2
    return STEMS[encoder.stem][1] * pooled * 4


def compute_feature_map(encoder: ResNet, images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N, feature_dim, h, w]: what the encoder takes the spatial mean of."""
    x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images))))
    return encoder.layer4(encoder.layer3(encoder.layer2(encoder.layer1(x))))


def _remove_stride(conv: nn.Conv2d) -> nn.Conv2d:
    if conv.padding == (1, 1):
        conv.stride = (1, 1)
        return conv
    dense = _UnstridedSameConv2d(conv.in_channels, conv.out_channels, 3, bias=False)
    dense.weight = conv.weight
    return dense


class _UnstridedSameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding at stride 2, without the stride.

    At an even size SAME puts all its padding behind, so the strided kernels lie one pixel further than PyTorch's.
    Rows and columns are padded so that output 2 i is the strided one's output i.
    """

    def forward(self, input: Tensor) -> Tensor:
        height, width = (_compute_same_padding(size) for size in input.shape[-2:])
        return F.conv2d(F.pad(input, (width, 2 - width, height, 2 - height)), self.weight)


def _compute_same_padding(size: int) -> int:
    """Pixels that SAME puts before ``size`` for a 3x3 kernel of stride 2."""
    return max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0) // 2
