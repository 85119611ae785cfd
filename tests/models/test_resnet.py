from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision

from relicctl.core.counter_rng import fork_seeded_rng
from relicctl.models.resnet import ARCHITECTURES, build_encoder

TORCHVISION = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


def images(count=2, size=32, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def without_fc(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


@pytest.mark.parametrize("arch", TORCHVISION)
def test_state_dict_is_torchvision_s_without_fc(arch):
    with torch.device("meta"):
        ours, theirs = build_encoder(arch), torchvision.models.get_model(arch)
    expected = without_fc(theirs.state_dict())
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [(k, v.shape) for k, v in expected.items()]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("training", [True, False])
def test_features_are_torchvision_s(arch, training):
    theirs = torchvision.models.get_model(arch)
    ours = build_encoder(arch)
    ours.load_state_dict(without_fc(theirs.state_dict()))
    theirs.fc = torch.nn.Identity()
    ours.train(training)
    theirs.train(training)
    features = ours(images())
    assert features.shape == (2, ours.feature_dim)
    torch.testing.assert_close(features, theirs(images()))


def test_the_start_is_torchvision_s():
    """He's distribution over the fan-out; gammas 1, the last of a block too; betas 0; eps; momentum."""
    encoder = build_encoder("resnet50")
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-5, 0.1)
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    kernel = encoder.layer3[0].conv2.weight
    assert kernel.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("width", [0.125, 0.25, 0.5, 2.0, 4.0])
def test_width_multiplies_stem_and_every_stage(width):
    with torch.device("meta"):
        one, other = build_encoder("resnet50"), build_encoder("resnet50", width)
    assert other.feature_dim == 2048 * width
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    for (name, a), b in pairs:
        expected = [size if size in (3, 1, 7) else int(size * width) for size in a.shape]
        assert list(b.shape) == expected, name


def test_odd_widths_are_rounded_to_multiples_of_eight_channels():
    with torch.device("meta"):
        encoder = build_encoder("resnet18", 0.3)  # 19.2 channels
    assert encoder.conv1.out_channels == 16
    assert encoder.feature_dim == 128


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_depth_is_in_the_name(arch):
    with torch.device("meta"):
        encoder = build_encoder(arch)
    convolutions = [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.Conv2d) and "downsample" not in name
    ]
    assert len(convolutions) + 1 == int(arch.removeprefix("resnet"))  # the missing one is the classifier


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 1), ("stride2", 2), ("cifar", 4)])
def test_stems_leave_maps_of_their_size(stem, size):
    encoder = build_encoder("resnet18", 0.125, stem)
    maps = []
    encoder.layer4[-1].register_forward_hook(lambda module, args, out: maps.append(out))
    encoder(images(size=32))
    assert maps[0].shape[-2:] == (size, size)


def reference_same(x, weight, stride):
    """TensorFlow's SAME by its definition: zeros around; output o sees what starts at stride x o - before."""
    k, size = weight.shape[-1], x.shape[-1]
    out = -(-size // stride)
    before = max((out - 1) * stride + k - size, 0) // 2
    padded = F.pad(x, (before, k, before, k))
    windows = padded.unfold(2, k, stride).unfold(3, k, stride)[:, :, :out, :out]
    return torch.einsum("nchwij,ocij->nohw", windows, weight)


@pytest.mark.parametrize("size", [32, 33, 47])
@pytest.mark.parametrize("stem", ["imagenet", "stride2", "cifar"])
def test_same_padding_is_tensorflow_s(size, stem):
    with fork_seeded_rng(0):
        encoder = build_encoder("resnet50", 0.125, stem, "same").eval()
    seen = []
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: seen.append((m, args[0].clone(), out.clone())))
    encoder(images(size=size))
    assert len(seen) == 53
    for module, x, out in seen:
        torch.testing.assert_close(out, reference_same(x, module.weight, module.stride[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [6, 7])
def test_same_max_pool_ignores_what_is_beyond_the_border(size):
    pool = build_encoder("resnet18", 0.125, "imagenet", "same").maxpool
    x = -1 - images(size=size).abs()
    out = -(-size // 2)
    before = ((out - 1) * 2 + 3 - size) // 2
    found = pool(x)
    assert found.shape[-2:] == (out, out)
    for i in range(out):
        for j in range(out):
            top, left = 2 * i - before, 2 * j - before
            window = x[:, :, max(top, 0) : top + 3, max(left, 0) : left + 3]
            assert torch.equal(found[:, :, i, j], window.amax((2, 3)))


def test_both_paddings_have_the_same_parameters():
    with fork_seeded_rng(0):
        one = build_encoder("resnet50", 0.125)
    with fork_seeded_rng(0):
        other = build_encoder("resnet50", 0.125, padding="same")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert list(one.state_dict()) == list(other.state_dict())


def test_weights_are_a_pure_function_of_the_seed():
    def weights(seed):
        with fork_seeded_rng(seed):
            return build_encoder("resnet18", 0.125).conv1.weight

    torch.manual_seed(0)
    first = weights(3)
    following = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(following, torch.rand(1)), "the caller's generator was touched"
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_activation_checkpointing_changes_nothing(arch):
    """Not the gradients, and not the running statistics, which a second forward would move once more."""

    def trained(activation_checkpointing):
        with fork_seeded_rng(0):
            encoder = build_encoder(arch, 0.125)
            encoder.activation_checkpointing = activation_checkpointing
        for step in range(2):
            encoder(images(4, seed=step)).square().mean().backward()
        return [p.grad for p in encoder.parameters()], list(encoder.buffers())

    for one, other in zip(trained(False), trained(True), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_activation_checkpointing_keeps_less_for_the_backward_pass():
    def kept(activation_checkpointing):
        encoder = build_encoder("resnet18", 0.125)
        encoder.activation_checkpointing = activation_checkpointing
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            encoder(images(4))
        return sum(sizes)

    assert kept(True) < kept(False) / 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"arch": "resnet19"}, "resnet19"),
        ({"arch": "resnet18", "stem": "big"}, "big"),
        ({"arch": "resnet18", "padding": "valid"}, "valid"),
        ({"arch": "resnet18", "width": 0.0}, "width"),
    ],
)
def test_unknown_names_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        build_encoder(**arguments)
