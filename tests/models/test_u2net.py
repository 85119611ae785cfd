"""U2-Net against the paper's figures, and what every mask network here promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from relicctl.bgmask.network import build_saliency_net
from relicctl.core.counter_rng import fork_seeded_rng
from relicctl.models.resnet import build_encoder
from relicctl.models.u2net import RSU

OUTPUTS = {"u2netp": 7, "resnet": 5}


def small(arch, hints=0):
    with fork_seeded_rng(0):
        encoder = build_encoder("resnet18", 0.125) if arch == "resnet" else None
        return build_saliency_net(arch, encoder, hints)


@pytest.mark.parametrize(("arch", "parameters"), [("u2net", 44_009_869), ("u2netp", 1_131_181)])
def test_the_sizes_are_the_papers(arch, parameters):
    """The paper gives 176.3 MB and 4.7 MB, BatchNorm's statistics and a file's names among them (arXiv 2005.09007)."""
    with torch.device("meta"):
        net = build_saliency_net(arch)
    assert sum(p.numel() for p in net.parameters()) == parameters
    megabytes = 4 * sum(t.numel() for t in net.state_dict().values()) / 1e6
    assert {"u2net": 176.3, "u2netp": 4.7}[arch] - 0.2 < megabytes < {"u2net": 176.3, "u2netp": 4.7}[arch]


@pytest.mark.parametrize(("height", "levels"), [(7, 6), (4, 3)])
def test_a_residual_u_halves_its_maps_level_by_level(height, levels):
    seen = []
    block = RSU(3, height, 4, 8)
    for convolution in block.down:
        convolution.register_forward_hook(lambda _, __, out: seen.append(out.shape[-1]))
    assert block(torch.randn(2, 3, 64, 64)).shape == (2, 8, 64, 64)
    assert seen == [64 >> k for k in range(levels)]


def test_the_dilated_u_keeps_its_resolution():
    block = RSU(3, 0, 4, 8)
    dilations = [layer.dilation[0] for layer in block.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert dilations == [1, 1, 2, 4, 8, 4, 2, 1]
    assert block(torch.randn(2, 3, 5, 7)).shape == (2, 8, 5, 7)


@pytest.mark.parametrize("arch", OUTPUTS)
@pytest.mark.parametrize("size", [(32, 32), (48, 80), (33, 51)])
@pytest.mark.parametrize("hints", [0, 4])
def test_every_output_is_logits_of_the_images_size(arch, size, hints):
    outputs = small(arch, hints)(torch.randn(2, 3 + hints, *size))
    assert [output.shape for output in outputs] == [(2, 1, *size)] * OUTPUTS[arch]
    assert min(float(output.detach().min()) for output in outputs) < 0  # no probability


@pytest.mark.parametrize("hints", [0, 4])
@pytest.mark.parametrize("arch", ["u2netp", "resnet"])
def test_every_side_output_trains_every_layer_above_it(arch, hints):
    net = small(arch, hints)
    sum(output.mean() for output in net(torch.randn(2, 3 + hints, 64, 64))).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_hints_are_added_to_the_decoder_of_a_network_of_images():
    """Its own weights are drawn as ever, and where those of the hints are 0 it says the same."""
    plain, hinted = small("resnet"), small("resnet", 4)
    images, maps = torch.randn(2, 3, 64, 64), torch.rand(2, 4, 64, 64)
    assert [name for name in hinted.state_dict() if name not in plain.state_dict()] == [
        f"hints.{level}.weight" for level in range(5)
    ]
    assert all(torch.equal(tensor, hinted.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert not torch.allclose(plain(images)[0], hinted(torch.cat([images, maps], 1))[0])
    for convolution in hinted.hints:
        nn.init.zeros_(convolution.weight)
    for alone, beside in zip(plain(images), hinted(torch.cat([images, maps], 1)), strict=True):
        torch.testing.assert_close(beside, alone)


def test_the_fused_output_is_made_of_the_side_outputs_alone():
    net = small("u2netp").eval()
    with torch.no_grad():
        fused, *sides = net(torch.randn(1, 3, 64, 64))
        weights, bias = net.fuse.weight.flatten(), net.fuse.bias
        expected = sum(w * side for w, side in zip(weights, sides, strict=True)) + bias
    torch.testing.assert_close(fused, expected)


@pytest.mark.parametrize(("size", "dilation"), [(1, 1), (1, 8), (2, 2), (2, 4), (3, 4)])
def test_bfloat16_convolutions_of_a_few_pixels_have_the_gradients_of_float32(size, dilation):
    """Such maps lie at the bottom of every U, where a CPU's kernels of other strides are known to fail."""
    with fork_seeded_rng(0):
        layer = nn.Conv2d(16, 16, 3, padding=dilation, dilation=dilation).to(memory_format=torch.channels_last)
        x, along = torch.randn(2, 16, 16, size, size)
    found = {}
    for enabled in (False, True):
        layer.zero_grad()
        inputs = x.clone(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = layer(inputs)
        (output.float() * along).sum().backward()
        found[enabled] = torch.cat([t.flatten() for t in (output.float(), inputs.grad, layer.weight.grad)])
    torch.testing.assert_close(found[True], found[False], rtol=0.05, atol=0.1)


def test_the_encoder_that_is_given_is_the_one_that_is_trained():
    encoder = build_encoder("resnet18", 0.125)
    weights = encoder.conv1.weight.detach().clone()
    net = build_saliency_net("resnet", encoder)
    assert torch.equal(net.state_dict()["encoder.conv1.weight"], weights)


@pytest.mark.parametrize("arch", ["u3net", "resnet"])
def test_unknown_names_and_a_missing_encoder_are_refused(arch):
    with pytest.raises(ValueError, match="resnet needs an encoder"):
        build_saliency_net(arch)
