"""BYOL, SimCLR and supervised losses against their definitions, written as loops in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from relicctl.core import objectives
from relicctl.core.objectives import byol_loss, simclr_loss, supervised_loss


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def cosine(a, b):
    return a @ b / (a.norm() * b.norm())


def assert_same_with_gradient(one, other, x):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (one, other)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("views", "large"), [(2, 2), (4, 2), (3, 1)])
def test_byol_equals_the_loop(views, large):
    online, target = random(views, 5, 4), random(large, 5, 4, seed=1)
    pairs = [(v, l) for v in range(views) for l in range(large) if v != l]
    terms = [2 - 2 * cosine(online[v, i], target[l, i].detach()) for v, l in pairs for i in range(5)]
    loss = byol_loss(online, target)["loss"]
    assert_same_with_gradient(loss, sum(terms) / len(terms), online)
    byol_loss(online, target)["loss"].backward()
    assert target.grad is None


def simclr_loop(z, temperature):
    views, images, _ = z.shape
    terms = []
    for v, w in itertools.permutations(range(views), 2):
        for i in range(images):
            positive = (cosine(z[v, i], z[w, i]) / temperature).exp()
            negatives = [
                (cosine(z[v, i], z[u, j]) / temperature).exp() for u in range(views) for j in range(images) if j != i
            ]
            terms.append(-(positive / (positive + sum(negatives))).log())
    return sum(terms) / len(terms)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("views", [2, 3])
def test_simclr_equals_the_loop(monkeypatch, views, one_by_one):
    if one_by_one:
        monkeypatch.setattr(objectives, "MAX_LOGITS", 1)
    z = random(views, 5, 4)
    assert_same_with_gradient(simclr_loss(z, temperature=0.2)["loss"], simclr_loop(z, 0.2), z)


def test_simclr_of_two_views_is_cross_entropy_over_all_other_embeddings():
    """The usual way to write NT-Xent: 2N rows, oneself masked, the other view as the class."""
    z = random(2, 6, 4)
    flat = F.normalize(z.flatten(0, 1), dim=-1)
    logits = (flat @ flat.T / 0.5).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(logits, torch.arange(12).roll(6))
    torch.testing.assert_close(simclr_loss(z, temperature=0.5)["loss"], expected)


def test_simclr_of_two_halves_equals_the_joined_batch():
    z = random(3, 8, 4)

    class Half:
        def __init__(self, rank):
            self.rank = rank

        def gather_online(self, mine):
            return F.normalize(z, dim=-1)

        def get_offset_and_total(self, local):
            return self.rank * local, 2 * local

    halves = [simclr_loss(z.chunk(2, 1)[r], temperature=0.2, gather=Half(r))["loss"] for r in range(2)]
    assert_same_with_gradient(sum(halves) / 2, simclr_loss(z, temperature=0.2)["loss"], z)


def test_supervised_is_the_mean_cross_entropy_of_all_views():
    logits, labels = random(3, 5, 7), torch.tensor([0, 6, 2, 2, 5])
    terms = [-logits[v, i].log_softmax(-1)[labels[i]] for v in range(3) for i in range(5)]
    assert_same_with_gradient(supervised_loss(logits, labels)["loss"], sum(terms) / 15, logits)


def test_all_are_computed_in_float32_under_autocast():
    z = random(2, 16, 8).detach().bfloat16()
    labels = torch.arange(8).repeat(2)

    def values(x):
        return [
            byol_loss(x, x)["loss"],
            simclr_loss(x, temperature=0.2)["loss"],
            supervised_loss(x, labels)["loss"],
        ]

    with torch.autocast("cpu", torch.bfloat16):
        found = values(z)
    assert [value.dtype for value in found] == [torch.float32] * 3
    assert found == values(z.float())


def test_one_view_is_refused():
    z = random(1, 4, 3)
    with pytest.raises(ValueError, match="two views"):
        byol_loss(z, z)
    with pytest.raises(ValueError, match="two views"):
        simclr_loss(z, temperature=0.2)
