from __future__ import annotations

import pytest
import torch
from torch import nn

from relicctl.core.counter_rng import fork_seeded_rng
from relicctl.models.resnet import build_encoder
from relicctl.models.siamese import MLPHead, Siamese


def pair(predictor=True, target=True, seed=0, per_view=False):
    with fork_seeded_rng(seed):
        encoder = build_encoder("resnet18", 0.125, "cifar")
        projector = MLPHead(encoder.feature_dim, 16, 8)
        networks = Siamese(encoder, projector, MLPHead(8, 16, 8) if predictor else None, target)
    networks.per_view = per_view
    return networks


def views(count, size, batch=3, seed=0):
    return torch.randn(count, batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


def test_head_has_its_four_layers():
    head = MLPHead(5, 7, 3)
    assert [(k, tuple(v.shape)) for k, v in head.named_parameters()] == [
        ("0.weight", (7, 5)),
        ("0.bias", (7,)),
        ("1.weight", (7,)),
        ("1.bias", (7,)),
        ("3.weight", (3, 7)),
    ]
    assert (head[1].eps, head[1].momentum) == (1e-5, 0.1)
    x = torch.randn(4, 5)
    hidden = x @ head[0].weight.T + head[0].bias
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(head(x), hidden.relu() @ head[3].weight.T)


def test_target_starts_as_a_copy_without_predictor_and_without_gradient():
    net = pair()
    assert list(net.target) == ["encoder", "projector"]
    assert list(net.online) == ["encoder", "projector", "predictor"]
    for name, tensor in net.target.state_dict().items():
        own = net.online.state_dict()[name]
        assert torch.equal(tensor, own)
        assert tensor.data_ptr() != own.data_ptr()
    assert not any(p.requires_grad for p in net.target.parameters())
    assert all(p.requires_grad for p in net.online.parameters())


def test_target_is_the_moving_average_of_the_online_parameters():
    net = pair()
    start = parameters(net.target)
    with torch.no_grad():
        for p in net.online.parameters():
            p.add_(torch.randn_like(p))
    online = parameters(net.online["encoder"]) + parameters(net.online["projector"])
    net.update_target(0.75)
    for was, now, theta in zip(start, net.target.parameters(), online, strict=True):
        torch.testing.assert_close(now, 0.75 * was + 0.25 * theta)
    net.update_target(1.0)
    once = parameters(net.target)
    net.update_target(1.0)
    assert all(torch.equal(a, b) for a, b in zip(once, net.target.parameters(), strict=True))
    net.update_target(0.0)
    assert all(torch.equal(a, b) for a, b in zip(online, net.target.parameters(), strict=True))


def test_moving_average_leaves_running_statistics_alone():
    net = pair()
    net([views(2, 8)])
    before = [b.clone() for b in net.target.buffers()]
    net.update_target(0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, net.target.buffers(), strict=True))


def test_online_forward_keeps_views_and_images_in_place():
    net = pair().eval()  # with running statistics every image is on its own
    large, small = views(2, 16), views(3, 8, seed=1)
    features, outputs = net([large, small])
    assert features.shape == (5, 3, net.online["encoder"].feature_dim)
    assert outputs.shape == (5, 3, 8)
    for v, (group, k) in enumerate([(large, 0), (large, 1), (small, 0), (small, 1), (small, 2)]):
        for i in range(3):
            alone = net.online["encoder"](group[k, i : i + 1])
            torch.testing.assert_close(features[v, i], alone[0])
            expected = net.online["predictor"](net.online["projector"](alone))[0]
            torch.testing.assert_close(outputs[v, i], expected)


def test_without_predictor_the_projection_comes_out():
    net = pair(predictor=False, target=False).eval()
    features, outputs = net([views(2, 8)])
    torch.testing.assert_close(outputs[1], net.online["projector"](features[1]))
    assert net.target is None


def test_one_encoder_forward_per_size_and_one_head_forward():
    net = pair()
    batches = {"encoder": [], "projector": [], "predictor": []}
    for name, seen in batches.items():
        net.online[name].register_forward_hook(lambda m, args, out, seen=seen: seen.append(len(args[0])))
    net([views(2, 16), views(3, 8)])
    assert batches == {"encoder": [6, 9], "projector": [15], "predictor": [15]}


def test_per_view_every_view_passes_the_networks_by_itself():
    """As in ReLICv2's pseudo-code: outputs, running statistics and the target's projections are those of a loop."""
    net, literal = pair(per_view=True), pair()
    large, small = views(2, 16), views(3, 8, seed=1)
    features, outputs = net.forward([large, small])
    for number, view in enumerate([*large, *small]):
        encoded = literal.online["encoder"](view)
        assert torch.equal(features[number], encoded)
        assert torch.equal(outputs[number], literal.online["predictor"](literal.online["projector"](encoded)))
    projections = torch.stack([literal.target["projector"](literal.target["encoder"](view)) for view in large])
    assert torch.equal(net.forward_target(large), projections)
    for (name, ours), theirs in zip(net.named_buffers(), literal.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not torch.allclose(outputs, pair().forward([large, small])[1]), "statistics of all views differ"


def test_target_forward_uses_the_batch_and_statistics_of_its_own():
    net = pair()
    x = views(2, 8)
    online_buffers = [b.clone() for b in net.online.buffers()]
    target_buffers = [b.clone() for b in net.target.buffers()]
    out = net.forward_target(x)
    assert out.shape == (2, 3, 8)
    assert not out.requires_grad
    torch.testing.assert_close(out, net.online["projector"](net.online["encoder"](x.flatten(0, 1))).view(2, 3, 8))
    net = pair()
    net.forward_target(x)
    assert all(torch.equal(a, b) for a, b in zip(online_buffers, net.online.buffers(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(target_buffers, net.target.buffers(), strict=True)), (
        "batch mode moves every running statistic"
    )


def test_gradient_reaches_the_online_network_alone():
    net = pair()
    _, outputs = net([views(2, 8), views(1, 4)])
    (outputs[:2] - net.forward_target(views(2, 8))).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.online.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in net.target.parameters())


@pytest.mark.parametrize("network", ["online", "target"])
def test_channels_last_views_reach_the_encoder_as_they_are(network):
    net = pair()
    seen = []
    getattr(net, network)["encoder"].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = views(2, 8).flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (2, 3))
    net([x]) if network == "online" else net.forward_target(x)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert seen[0].data_ptr() == x.data_ptr(), "no copy"


def test_any_module_serves_as_projector():
    encoder = build_encoder("resnet18", 0.125, "cifar")
    net = Siamese(encoder, nn.Linear(encoder.feature_dim, 10), None, target=False)
    assert net([views(2, 8)])[1].shape == (2, 3, 10)


def test_microbatches_give_the_gradient_of_the_whole_batch_with_the_same_ghost_norm():
    """Against the parts run one by one and kept: same outputs, gradients and running statistics, bit for bit."""
    views = [torch.randn(2, 6, 3, 16, 16), torch.randn(1, 6, 3, 8, 8)]
    weights = torch.randn(3, 6, 8)

    def build(microbatch):
        with fork_seeded_rng(0):
            encoder = build_encoder("resnet18", 0.125, "stride2")
            networks = Siamese(encoder, MLPHead(64, 16, 8), MLPHead(8, 16, 8), True)
            networks.microbatch = microbatch
            return networks

    cached, plain = build(2), build(None)
    outputs = cached(views)[1]
    (outputs * weights).sum().backward()
    parts = [plain([view[:, i : i + 2] for view in views])[1] for i in (0, 2, 4)]
    (torch.cat(parts, 1) * weights).sum().backward()

    assert torch.equal(outputs, torch.cat(parts, 1))
    for (name, p), q in zip(cached.online.named_parameters(), plain.online.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)
    for (name, p), q in zip(cached.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(p, q), name
    expected = torch.cat([plain.forward_target(views[0][:, i : i + 2]) for i in (0, 2, 4)], 1)
    assert torch.equal(cached.forward_target(views[0]), expected)


def test_compiling_is_for_training_alone():
    """Names in checkpoints stay, and evaluation calls the encoder as it is. (Nothing compiles before it is called.)"""
    networks = pair()
    names, encoder = list(networks.state_dict()), networks.online["encoder"]
    networks.compile_encoders()
    assert list(networks.state_dict()) == names
    assert networks.online["encoder"] is encoder
    assert encoder._compiled_call_impl is None
