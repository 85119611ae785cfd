from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from relicctl.core.optim import LARS, build_optimizer, build_param_groups


def lars_in_numpy(params, gradients, lrs, momentum, weight_decay, trust):
    """BYOL's order of operations, one tensor at a time. One-dimensional tensors: plain momentum SGD."""
    params = [p.copy() for p in params]
    buffers = [np.zeros_like(p) for p in params]
    for step_gradients, lr in zip(gradients, lrs, strict=True):
        for k, g in enumerate(step_gradients):
            if params[k].ndim > 1:
                g = g + weight_decay * params[k]
                p_norm, g_norm = np.sqrt((params[k] ** 2).sum()), np.sqrt((g**2).sum())
                if p_norm > 0 and g_norm > 0:
                    g = g * trust * p_norm / g_norm
            buffers[k] = momentum * buffers[k] + g
            params[k] = params[k] - lr * buffers[k]
    return params


def run(optimizer, params, gradients, lrs):
    for step_gradients, lr in zip(gradients, lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, g in zip(params, step_gradients, strict=True):
            p.grad = torch.from_numpy(g.copy())
        optimizer.step()


def twenty_steps(rng):
    """Weights, biases, a weight of norm 0, and a weight whose gradient is 0 half of the time."""
    params = [rng.normal(size=s) for s in [(4, 3), (5,), (2, 3, 3, 3), (4, 4), (3, 3), (1,)]]
    params[3][:] = 0.0
    gradients = [[rng.normal(size=p.shape) for p in params] for _ in range(20)]
    for step in range(10):
        gradients[step][4][:] = 0.0
    return params, gradients, rng.uniform(0.1, 2.0, size=20).tolist()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_equals_numpy_over_twenty_steps(weight_decay):
    start, gradients, lrs = twenty_steps(np.random.default_rng(0))
    params = [nn.Parameter(torch.from_numpy(p.copy())) for p in start]
    optimizer = build_optimizer("lars", [(str(k), p) for k, p in enumerate(params)], 1.0, 0.9, weight_decay)
    run(optimizer, params, gradients, lrs)
    expected = lars_in_numpy(start, gradients, lrs, 0.9, weight_decay, trust=1e-3)
    for p, e in zip(params, expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), e, rtol=1e-12, atol=1e-14)
    assert np.abs(expected[3]).max() > 1  # the weight of norm 0 was not stuck: its first ratio is 1


def test_lars_without_a_gradient_leaves_the_parameter_and_the_gradients_alone():
    moved, still = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([moved, still], lr=1.0, weight_decay=0.1)
    moved.grad = torch.full((2, 2), 3.0)
    optimizer.step()
    assert torch.equal(moved.grad, torch.full((2, 2), 3.0))
    assert torch.equal(still, torch.ones(2, 2))
    assert not torch.equal(moved, torch.ones(2, 2))


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_restored_lars_continues_bitwise(name):
    start, gradients, lrs = twenty_steps(np.random.default_rng(1))
    params = [nn.Parameter(torch.from_numpy(p.copy())) for p in start]

    def build(params):
        return build_optimizer(name, [(str(k), p) for k, p in enumerate(params)], 1.0, 0.9, 0.01)

    optimizer = build(params)
    run(optimizer, params, gradients[:10], lrs[:10])
    others = [nn.Parameter(p.detach().clone()) for p in params]
    restored = build(others)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, gradients[10:], lrs[10:])
    run(restored, others, gradients[10:], lrs[10:])
    for p, other in zip(params, others, strict=True):
        assert torch.equal(p, other)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_biases_and_batchnorm_have_no_weight_decay(name):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    optimizer = build_optimizer(name, net.named_parameters(), 0.5, 0.9, 0.1)
    decayed, spared = optimizer.param_groups
    assert [p.ndim for p in decayed["params"]] == [2, 2]
    assert [p.ndim for p in spared["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(2.0)
            p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all((p == 2.0).all() for p in spared["params"])
    assert all((p < 2.0).all() for p in decayed["params"])


def test_frozen_parameters_and_empty_groups_are_left_out():
    net = nn.Linear(3, 4)
    net.bias.requires_grad_(False)
    (group,) = build_param_groups(net.named_parameters(), 0.1)
    assert group["params"][0] is net.weight


def test_sgd_and_adamw_equal_pytorch():
    rng = np.random.default_rng(2)
    gradients = [[rng.normal(size=(3, 3))] for _ in range(5)]
    for name, plain in [
        ("sgd", lambda p: torch.optim.SGD([p], 0.1, momentum=0.9, weight_decay=0.01)),
        ("adamw", lambda p: torch.optim.AdamW([p], 0.1, betas=(0.9, 0.999), weight_decay=0.01)),
    ]:
        ours, theirs = (nn.Parameter(torch.ones(3, 3, dtype=torch.float64)) for _ in range(2))
        run(build_optimizer(name, [("w", ours)], 0.1, 0.9, 0.01), [ours], gradients, [0.1] * 5)
        run(plain(theirs), [theirs], gradients, [0.1] * 5)
        torch.testing.assert_close(ours, theirs)


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="lion"):
        build_optimizer("lion", nn.Linear(2, 2).named_parameters(), 0.1, 0.9, 0.0)
