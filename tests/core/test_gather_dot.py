"""Products of chosen pairs against the plain expression."""

from __future__ import annotations

import torch

from relicctl.core.loss import gather_dot


def example():
    draw = torch.Generator().manual_seed(0)
    anchors = torch.randn(2, 5, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    others = torch.randn(3, 7, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    return anchors, others, torch.randint(7, (2, 3, 5, 6), generator=draw)  # rows come several times


def test_gather_dot_equals_the_full_matrix():
    anchors, others, picked = example()
    matrix = torch.einsum("and,bmd->abnm", anchors, others)
    torch.testing.assert_close(gather_dot(anchors, others, picked), matrix.gather(-1, picked))


def test_gradients_are_numerically_right():
    anchors, others, picked = example()
    assert torch.autograd.gradcheck(gather_dot, (anchors, others, picked))
    for fixed in (0, 1):
        inputs = [anchors, others, picked]
        inputs[fixed] = inputs[fixed].detach()
        assert torch.autograd.gradcheck(gather_dot, inputs)


def test_gather_dot_accepts_views_and_transposes():
    anchors, others, picked = example()
    assert torch.equal(
        gather_dot(anchors.mT.contiguous().mT, others, picked.transpose(0, 1).contiguous().transpose(0, 1)),
        gather_dot(anchors, others, picked),
    )
