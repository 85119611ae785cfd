"""The priors' maps as an input: what stands in for one that is missing, and that images and hints stay together."""

from __future__ import annotations

import numpy as np
import torch

from relicctl.bgmask.priors.maps import UNDECIDED, build_prior_channels, quantize_maps, to_network_input


def test_a_map_that_is_not_valid_is_the_mean_of_the_others():
    maps = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 5), dtype=np.uint8)
    valid = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]], bool)
    made = build_prior_channels(maps, valid).numpy()
    np.testing.assert_array_equal(made[0], maps[0])
    np.testing.assert_array_equal(made[1, [0, 2, 3]], maps[1, [0, 2, 3]])
    np.testing.assert_array_equal(made[1, 1], np.rint(maps[1, [0, 2, 3]].mean(axis=0)))
    assert (made[2] == UNDECIDED).all()


def test_inputs_are_not_modified():
    maps, valid = np.zeros((1, 4, 2, 2), np.uint8), np.zeros((1, 4), bool)
    maps.setflags(write=False)  # as a store's are
    assert (build_prior_channels(maps, valid) == UNDECIDED).all()


def test_quantized_maps_have_no_nan():
    maps = np.random.default_rng(0).random((3, 4, 4)).astype(np.float32)
    maps[1, 2, 2] = np.nan
    kept, valid = quantize_maps(maps)
    assert valid.tolist() == [True, False, True]
    np.testing.assert_array_equal(kept[[0, 2]], np.rint(255 * maps[[0, 2]]))
    assert not kept[1].any()


def test_network_input_is_centred_at_zero():
    made = to_network_input(torch.tensor([0, 255], dtype=torch.uint8)[None, :, None, None].expand(1, 2, 6, 6), 3)
    torch.testing.assert_close(made, torch.tensor([-0.5, 0.5])[None, :, None, None].expand(1, 2, 3, 3))
