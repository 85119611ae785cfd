"""The kernels, run line by line by Triton's interpreter on a CPU, against the plain operations.

Triton settles when it is imported whether it interprets: so this file is run as a program of its own.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from relicctl.data import augment
from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.data.photometric import AugmentConfig, AugmentParams, draw_augment_params


def pictures(views: int, batch: int, *side: int) -> torch.Tensor:
    """uint8 [views, batch, *side, 3]: noise, greys, pure colours and near black, image by image."""
    images = np.random.default_rng(0).integers(0, 256, (views, batch, *side, 3))
    images[:, 1::4] = images[:, 1::4, ..., :1]
    images[:, 2::4] = 255 * (images[:, 2::4] > 127)
    images[:, 3::4] //= 64
    return torch.from_numpy(images.astype(np.uint8))


def draws(views: int, batch: int) -> AugmentParams:
    """Strong ones, and every order of the jitter."""
    spec = AugmentConfig(color_jitter_prob=0.9, saturation=0.6, hue=0.4, blur_prob=(0.7, 0.3), solarize_prob=(0.2, 0.5))
    drawn = draw_augment_params(spec, 0, 1, np.arange(batch), views)
    orders = np.resize(np.array(list(itertools.permutations(range(4)))), (views, batch, 4))
    return replace(drawn, order=orders)


def compare() -> None:
    from relicctl.data import augment_triton as kernels

    # a part of a program's pixels; images of two programs; and what tries the kernels out
    for views, batch, side in ((2, 24, (12, 12)), (1, 1, (2, 2)), (1, 6, (37, 41))):
        interleaved = pictures(views, batch, *side).movedim(-1, 2)
        planes = interleaved.contiguous()
        for images in (interleaved, planes, planes.float().div(255)):
            assert kernels.is_supported(images)
            drawn = draws(views, batch)
            made, expected = (
                kernels.apply(images, drawn, IMAGENET_MEAN, IMAGENET_STD),
                augment._apply_torch(images.clone(), drawn, IMAGENET_MEAN, IMAGENET_STD),
            )
            torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)
    assert not kernels.is_supported(planes[:, :5])
    assert not kernels.is_supported(planes[..., :11])


def test_the_kernels_are_the_plain_operations():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    compare()
