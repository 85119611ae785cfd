"""ImageNet's channel statistics, by which every image is normalised."""

from __future__ import annotations

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
