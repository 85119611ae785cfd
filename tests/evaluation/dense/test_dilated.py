"""The law of the surgery: at even positions the dense features are the encoder's own."""

from __future__ import annotations

import pytest
import torch

from relicctl.evaluation.dense.segmentation import compute_feature_map, dilate_last_stage
from tests.helpers.runs import lively_encoder

STRIDES = {"imagenet": 16, "cifar": 4, "stride2": 8}  # pixels per feature


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("stem", ["imagenet", "cifar", "stride2"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("side", [(32, 48), (35, 49)])
def test_even_positions_are_the_features_of_the_encoder_as_it_was(arch, stem, padding, side):
    encoder = lively_encoder(arch, 0.125, stem, padding).double()
    images = torch.randn(2, 3, *side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sparse, dense = compute_feature_map(encoder, images), compute_feature_map(dilate_last_stage(encoder), images)
        torch.testing.assert_close(sparse.mean((2, 3)), encoder(images), rtol=0, atol=1e-12)
    torch.testing.assert_close(dense[..., ::2, ::2], sparse, rtol=0, atol=1e-12)
    assert tuple(dense.shape[-2:]) == tuple(-(-s // STRIDES[stem]) for s in side)
    assert not torch.allclose(dense[..., 1::2, ::2][..., :1, :1], sparse[..., :1, :1])


def test_the_encoder_itself_and_the_names_of_its_weights_stay():
    encoder = lively_encoder("resnet18", 0.125, "imagenet")
    images = torch.randn(1, 3, 64, 64)
    before = encoder(images)
    surgery = dilate_last_stage(encoder)
    assert torch.equal(encoder(images), before)
    assert list(surgery.state_dict()) == list(encoder.state_dict())
    surgery.load_state_dict(encoder.state_dict(), strict=True)
