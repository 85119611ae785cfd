"""ResNet v1 with stride on the 3x3 convolution, of any depth and width, without a classifier.

The blocks are torchvision's, and so are all state-dict names: the weights of its resnet18/34/50/101/152
load strictly once ``fc`` is left out. What differs from torchvision: ``width`` multiplies every stage and the
stem (ReLICv2, arXiv 2201.05119; its ``wide_resnet`` widens only the inner convolution), there are stems for
small images, and the padding can be TensorFlow's.

BatchNorm: eps 1e-5, momentum 0.1, the last gamma of a block starts at 1, not 0 (BYOL, arXiv 2006.07733).
Convolutions start from He's normal distribution over the fan-out, as in torchvision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from relicctl.models.layers import run_checkpointed

ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
    "resnet200": (Bottleneck, (3, 24, 36, 3)),
}
STEMS = {"imagenet": (7, 2), "cifar": (3, 1), "stride2": (3, 2)}  # kernel and stride of the first convolution
PADDINGS = ("symmetric", "same")


class ResNet(nn.Module):
    """[N, 3, H, W] -> [N, feature_dim]: the spatial mean of the last stage. Built by ``build_encoder``."""

    def __init__(self, arch: str, width: float, stem: str, padding: str) -> None:
        super().__init__()
        self.arch, self.width, self.stem, self.padding = arch, width, stem, padding
        self.activation_checkpointing = False  # True: save only the blocks' inputs for the backward pass
        block, depths = ARCHITECTURES[arch]
        planes = max(8, 8 * round(8 * width))  # the stem's channels, 64 x width; stages double them
        kernel, stride = STEMS[stem]

        self.conv1 = nn.Conv2d(3, planes, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        self.layer1 = _build_stage(block, planes, planes, depths[0], stride=1)
        self.layer2 = _build_stage(block, planes * block.expansion, 2 * planes, depths[1], stride=2)
        self.layer3 = _build_stage(block, 2 * planes * block.expansion, 4 * planes, depths[2], stride=2)
        self.layer4 = _build_stage(block, 4 * planes * block.expansion, 8 * planes, depths[3], stride=2)
        self.feature_dim = 8 * planes * block.expansion

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if padding == "same":
            _pad_as_tensorflow(self)

    def forward(self, x: Tensor) -> Tensor:
        is_checkpointed = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = run_checkpointed(block, block, x) if is_checkpointed else block(x)
        return x.mean((2, 3))


def build_encoder(arch: str, width: float = 1.0, stem: str = "imagenet", padding: str = "symmetric") -> ResNet:
    """Build a randomly initialised encoder.

    ``arch``: a key of ``ARCHITECTURES``.
    ``width``: factor on all channels; 64 x width is rounded to a multiple of 8.
    ``stem``: ``imagenet`` (7x7 stride 2, max-pool), ``cifar`` (3x3 stride 1) or ``stride2`` (3x3 stride 2).
    ``padding``: ``symmetric`` (PyTorch's) or ``same`` (TensorFlow's: at stride 2 and an even size the odd row
    and column come last); the parameters are the same.

    Draws from torch's default CPU generator: wrap the call in ``fork_seeded_rng``. ValueError for unknown names.
    """
    for name, value, known in (("arch", arch, ARCHITECTURES), ("stem", stem, STEMS), ("padding", padding, PADDINGS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: one of {', '.join(known)}")
    if not width > 0:
        raise ValueError(f"width must be above 0, got {width}")
    return ResNet(arch, width, stem, padding)


def _build_stage(
    block: type[BasicBlock] | type[Bottleneck], channels: int, planes: int, depth: int, stride: int
) -> nn.Sequential:
    out = planes * block.expansion
    downsample = None
    if stride != 1 or channels != out:
        downsample = nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))
    first = block(channels, planes, stride, downsample)
    return nn.Sequential(first, *(block(out, planes) for _ in range(1, depth)))


def _pad_same(x: Tensor, kernel: int, stride: int, value: float) -> Tensor:
    """Pad ``x`` as TensorFlow's SAME: ceil(size / stride) outputs, the odd row or column last."""
    height, width = ((-(-size // stride) - 1) * stride + kernel - size for size in x.shape[-2:])
    height, width = max(height, 0), max(width, 0)
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2), value=value)


class _SameConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        padded = _pad_same(input, self.kernel_size[0], self.stride[0], 0.0)
        return F.conv2d(padded, self.weight, None, self.stride)


class _SameMaxPool2d(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(_pad_same(x, 3, 2, float("-inf")), 3, 2)


def _pad_as_tensorflow(model: ResNet) -> None:
    """Replace the layers of stride 2; at stride 1, and for 1x1 kernels, both paddings are the same."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Conv2d) and layer.stride[0] > 1 and layer.kernel_size[0] > 1:
                kernel, stride = layer.kernel_size[0], layer.stride[0]
                same = _SameConv2d(layer.in_channels, layer.out_channels, kernel, stride, bias=False)
                same.weight = layer.weight
                setattr(parent, name, same)
            elif isinstance(layer, nn.MaxPool2d):
                setattr(parent, name, _SameMaxPool2d())
