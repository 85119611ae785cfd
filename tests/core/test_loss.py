"""The loss against its definition: a float64 loop over pairs and images, for reading, not for speed."""

from __future__ import annotations

import math

import pytest
import torch

from relicctl.core import loss as loss_module
from relicctl.core.loss import relicv2_loss, sample_negatives

TEMPERATURE, ALPHA, BETA = 0.2, 0.7, 3.0
SETUPS = [(2, 0), (4, 2), (2, 6)]  # large and small views


def literal(online, target, negatives, invariance="transposed", alpha=ALPHA, beta=BETA):
    """The definition as it stands. ``negatives[v][l][i]`` lists the other candidates of image i.

    The detached entropy uses plain numbers (``.item()``), so no gradient can pass through it.
    """
    views, images, _ = online.shape
    large = target.shape[0]
    z = [[online[v, i] / online[v, i].norm() for i in range(images)] for v in range(views)]
    t = [[(target[l, i] / target[l, i].norm()).detach() for i in range(images)] for l in range(large)]

    def log_softmax(logits):
        exponentials = [logit.exp() for logit in logits]
        return [exponential.log() - sum(exponentials).log() for exponential in exponentials]

    total = online.new_zeros(())
    for v in range(views):
        for l in range(large):
            for i in range(images):
                candidates = [i, *negatives[v][l][i]]
                log_p = log_softmax([z[v][i] @ t[l][j] / TEMPERATURE for j in candidates])
                if invariance == "swapped" and v < large:
                    log_r = log_softmax([z[l][i] @ t[v][j] / TEMPERATURE for j in candidates])
                else:
                    log_r = log_softmax([t[l][i] @ z[v][j] / TEMPERATURE for j in candidates])
                nll = -log_p[0]
                negative_entropy = sum(math.exp(q.item()) * q.item() for q in log_p)
                kl = negative_entropy - sum(q.exp() * r for q, r in zip(log_p, log_r, strict=True))
                total = total + alpha * nll + beta * kl
    return total / (views * large * images)


def outputs(views, large, images=5, dim=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    online = torch.randn(views, images, dim, generator=generator, dtype=dtype, requires_grad=True)
    target = torch.randn(large, images, dim, generator=generator, dtype=dtype, requires_grad=True)
    return online, target


def everyone_else(views, large, images):
    return [[[[j for j in range(images) if j != i] for i in range(images)]] * large] * views


def relic(online, target, **changes):
    keys = {
        "large": target.shape[0],
        "temperature": TEMPERATURE,
        "alpha": ALPHA,
        "beta": BETA,
        "negatives": "all",
    }
    return relicv2_loss(online, target, **(keys | changes))


def value_and_gradient(loss, online):
    return loss.detach(), torch.autograd.grad(loss, online)[0]


def assert_same(one, other, **tolerance):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-10, "atol": 1e-12}))


@pytest.mark.parametrize("invariance", ["transposed", "swapped"])
@pytest.mark.parametrize(("large", "small"), SETUPS)
@pytest.mark.parametrize("n", [1, 3, "all"])
def test_value_and_gradient_equal_the_literal_loop(n, large, small, invariance):
    online, target = outputs(large + small, large)
    if n == "all":
        negatives, listed = "all", everyone_else(large + small, large, 5)
    else:
        negatives = sample_negatives(large + small, large, 5, 5, n, torch.Generator().manual_seed(1))
        listed = negatives.tolist()
    found = relic(online, target, negatives=negatives, invariance=invariance)
    expected = literal(online, target, listed, invariance)
    assert_same(value_and_gradient(found["loss"], online), value_and_gradient(expected, online))


@pytest.mark.parametrize("part", ["nll", "kl"])
def test_each_term_equals_the_literal_loop(part):
    """For ``kl`` alone the gradient tells which term is detached: the loop takes the entropy as a number."""
    online, target = outputs(3, 2)
    weights = {"alpha": float(part == "nll"), "beta": float(part == "kl")}
    expected = literal(online, target, everyone_else(3, 2, 5), **weights)
    assert_same(value_and_gradient(relic(online, target)[part], online), value_and_gradient(expected, online))


def test_gradient_of_the_invariance_term_is_not_that_of_a_kl_divergence():
    """Were the entropy not detached, or p detached in the second term, the gradient would be another."""
    online, target = outputs(2, 2)
    z = torch.nn.functional.normalize(online, dim=-1)
    t = torch.nn.functional.normalize(target.detach(), dim=-1)
    logits = torch.einsum("vid,ljd->vlij", z, t) / TEMPERATURE
    log_p, log_r = logits.log_softmax(-1), logits.transpose(2, 3).log_softmax(-1)

    def gradient(p_of_entropy, p_of_cross):
        kl = ((p_of_entropy.exp() * p_of_entropy) - p_of_cross.exp() * log_r).sum(-1).mean()
        return torch.autograd.grad(kl, online, retain_graph=True)[0]

    found = torch.autograd.grad(relic(online, target)["kl"], online)[0]
    torch.testing.assert_close(found, gradient(log_p.detach(), log_p), rtol=1e-10, atol=1e-12)
    assert (found - gradient(log_p, log_p)).abs().max() > 1e-3
    assert (found - gradient(log_p.detach(), log_p.detach())).abs().max() > 1e-3


@pytest.mark.parametrize("invariance", ["transposed", "swapped"])
def test_derivative_of_the_undetached_part_is_numerically_right(invariance):
    """KL plus the entropy is the cross entropy, whose finite differences must be the gradient found."""
    online, target = outputs(3, 2, images=4, dim=3)
    negatives = sample_negatives(3, 2, 4, 4, 2, torch.Generator().manual_seed(0))

    def without_entropy(x):
        found = relic(x, target, negatives=negatives, invariance=invariance)
        return ALPHA * found["nll"] + BETA * (found["kl"] + found["entropy"])

    assert torch.autograd.gradcheck(without_entropy, (online,))


def test_parts_add_up_and_entropy_is_that_of_p():
    online, target = outputs(4, 2)
    found = relic(online, target)
    torch.testing.assert_close(found["loss"], ALPHA * found["nll"] + BETA * found["kl"])
    z = torch.nn.functional.normalize(online, dim=-1)
    t = torch.nn.functional.normalize(target, dim=-1)
    p = (torch.einsum("vid,ljd->vlij", z, t) / TEMPERATURE).softmax(-1)
    torch.testing.assert_close(found["entropy"], -(p * p.log()).sum(-1).mean().detach())
    assert not found["entropy"].requires_grad
    assert found["nll"].requires_grad
    assert found["kl"].requires_grad


def test_kl_is_a_divergence():
    """Never negative, and zero where online and target agree on symmetric similarities."""
    online, target = outputs(4, 2)
    assert relic(online, target)["kl"] > 0
    same = online.detach()[:1]
    assert relic(same, same)["kl"].abs() < 1e-12


def test_target_gets_no_gradient():
    online, target = outputs(4, 2)
    relic(online, target)["loss"].backward()
    assert target.grad is None


@pytest.mark.parametrize("invariance", ["transposed", "swapped"])
def test_order_of_images_does_not_matter(invariance):
    online, target = outputs(4, 2)
    order = torch.tensor([3, 0, 4, 2, 1])
    value, gradient = value_and_gradient(relic(online, target, invariance=invariance)["loss"], online)
    shuffled = value_and_gradient(relic(online[:, order], target[:, order], invariance=invariance)["loss"], online)
    assert_same((value, gradient), shuffled)


def test_length_of_the_outputs_does_not_matter():
    online, target = outputs(4, 2)
    torch.testing.assert_close(relic(online * 7, target / 3)["loss"], relic(online, target)["loss"])


@pytest.mark.parametrize("invariance", ["transposed", "swapped"])
@pytest.mark.parametrize("n", [3, "all"])
def test_pair_by_pair_equals_all_at_once(monkeypatch, n, invariance):
    online, target = outputs(5, 2)
    draw = torch.Generator()
    keys = {"negatives": n, "invariance": invariance, "generator": draw}
    draw.manual_seed(3)
    at_once = value_and_gradient(relic(online, target, **keys)["loss"], online)
    monkeypatch.setattr(loss_module, "MAX_LOGITS", 10)
    draw.manual_seed(3)
    assert_same(at_once, value_and_gradient(relic(online, target, **keys)["loss"], online))
    with torch.no_grad():
        draw.manual_seed(3)
        torch.testing.assert_close(relic(online, target, **keys)["loss"], at_once[0])


@pytest.mark.parametrize("joined", [False, True], ids=["alone", "in a group"])
@pytest.mark.parametrize("device", ["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("invariance", ["transposed", "swapped"])
def test_gathered_logits_equal_the_full_matrix(monkeypatch, invariance, device, joined):
    online, target = outputs(5, 2, images=8)
    negatives = sample_negatives(5, 2, 8, 8, 3, torch.Generator().manual_seed(3))

    def found():
        if not joined:
            return value_and_gradient(relic(online, target, negatives=negatives, invariance=invariance)["loss"], online)
        halves = [
            relic(
                online.chunk(2, 1)[rank], target.chunk(2, 1)[rank], gather=Half(online, target, rank),
                negatives=negatives.chunk(2, 2)[rank], invariance=invariance,
            )["loss"] for rank in (0, 1)
        ]  # fmt: skip
        return value_and_gradient(sum(halves) / 2, online)

    by_matrix = found()
    monkeypatch.setattr(loss_module, "GATHER_MIN_RATIO", 0)
    if device == "as on a GPU":
        monkeypatch.setattr(loss_module, "PAIRWISE_DEVICES", ())
    monkeypatch.setattr(loss_module, "_sum_terms", counted := Counted(loss_module._sum_terms))
    assert_same(by_matrix, found())
    at_once = 1 if invariance == "transposed" else 2
    assert counted.calls == (1 + joined) * (10 if device == "as on a CPU" else at_once)


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


class Half:
    """Gather of the ``rank``-th of two processes, both of which live in this one."""

    def __init__(self, online, target, rank):
        self.parts, self.target_parts, self.rank = online.chunk(2, 1), target.chunk(2, 1), rank

    def gather_online(self, mine):
        unit = [torch.nn.functional.normalize(part, dim=-1) / TEMPERATURE for part in self.parts]
        torch.testing.assert_close(mine, unit[self.rank])
        return torch.cat(unit, 1)

    def gather_target(self, mine):
        assert not mine.requires_grad
        return torch.nn.functional.normalize(torch.cat(self.target_parts, 1).detach(), dim=-1)

    def get_offset_and_total(self, local):
        return self.rank * local, 2 * local


@pytest.mark.parametrize("invariance", ["transposed", "swapped"])
@pytest.mark.parametrize("n", [3, "all"])
def test_two_halves_equal_the_joined_batch(n, invariance):
    online, target = outputs(4, 2, images=8)

    def half(rank):
        return relic(
            online.chunk(2, 1)[rank],
            target.chunk(2, 1)[rank],
            gather=Half(online, target, rank),
            negatives=n,
            invariance=invariance,
            generator=torch.Generator().manual_seed(5),
        )["loss"]

    draw = torch.Generator().manual_seed(5)
    joined = relic(online, target, negatives=n, invariance=invariance, generator=draw)["loss"]
    assert_same(value_and_gradient((half(0) + half(1)) / 2, online), value_and_gradient(joined, online))


def test_batch_minus_one_negatives_equal_all():
    online, target = outputs(4, 2)
    torch.testing.assert_close(relic(online, target, negatives=4)["loss"], relic(online, target)["loss"])
    drawn = sample_negatives(4, 2, 5, 5, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(relic(online, target, negatives=drawn)["loss"], relic(online, target)["loss"])


def test_generator_determines_the_negatives():
    online, target = outputs(4, 2)

    def value(seed):
        return relic(online, target, negatives=2, generator=torch.Generator().manual_seed(seed))["loss"].item()

    assert value(0) == value(0)
    assert value(0) != value(1)


def test_half_precision_outputs_are_computed_in_float32_under_autocast():
    online, target = outputs(4, 2, images=32, dim=16, dtype=torch.float32)
    online, target = online.bfloat16(), target.bfloat16()
    expected = relic(online.float(), target.float())["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        found = relic(online, target)["loss"]
    assert found.dtype == torch.float32
    assert found == expected


def test_zero_outputs_give_finite_gradients():
    online = torch.zeros(2, 4, 3, requires_grad=True)
    loss = relic(online, torch.zeros(2, 4, 3))["loss"]
    loss.backward()
    assert loss.isfinite()
    assert online.grad.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"negatives": 5}, "negatives"),
        ({"negatives": 0}, "negatives"),
        ({"negatives": "some"}, "negatives"),
        ({"negatives": torch.zeros(4, 2, 3, 1, dtype=torch.int64)}, "negatives"),
        ({"large": 3}, "large"),
        ({"temperature": 0.0}, "temperature"),
        ({"invariance": "sideways"}, "invariance"),
    ],
)
def test_invalid_arguments_are_refused(changes, word):
    online, target = outputs(4, 2)
    with pytest.raises(ValueError, match=word):
        relic(online, target, **changes)


# 126 of 127 others are drawn by random order, the rest by Floyd's algorithm.
@pytest.mark.parametrize(("total", "n"), [(64, 10), (12, 11), (128, 126), (2, 1)])
def test_negatives_exclude_the_image_itself_and_do_not_repeat(total, n):
    rows = torch.arange(total)
    drawn = sample_negatives(3, 2, total, total, n, torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 2, total, n)
    assert drawn.min() >= 0
    assert drawn.max() < total
    assert not (drawn == rows[:, None]).any()
    assert (drawn.sort(-1).values.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("by_order", [False, True])
def test_every_set_of_negatives_is_equally_likely(monkeypatch, by_order):
    """Chi-square over the 10 sets of 2 out of 5 others, and over rows; 0.1 % critical values."""
    if by_order:
        monkeypatch.setattr(loss_module, "FLOYD_MAX_RATIO", 0)
    draws = 6000
    drawn = sample_negatives(draws, 1, 6, 6, 2, torch.Generator().manual_seed(0))[:, 0]
    for row in range(6):
        low, high = drawn[:, row].min(-1).values, drawn[:, row].max(-1).values
        counts = torch.bincount(low * 6 + high)
        counts = counts[counts > 0].double()
        assert len(counts) == 10
        assert ((counts - draws / 10) ** 2 / (draws / 10)).sum() < 27.9  # 9 degrees of freedom


def test_negatives_of_different_views_and_rows_are_independent():
    """Joint counts of the one negative of two views, and of two rows: all 25 combinations equally likely."""
    drawn = sample_negatives(2, 6000, 6, 6, 1, torch.Generator().manual_seed(0))[..., 0]
    others = drawn - (drawn > torch.arange(6)).long()  # 0..4, counted among the others
    for one, two in [(others[0, :, 0], others[1, :, 0]), (others[0, :, 2], others[0, :, 3])]:
        counts = torch.bincount(one * 5 + two, minlength=25).double()
        assert ((counts - 240) ** 2 / 240).sum() < 51.2  # 24 degrees of freedom, 0.1 %


def test_processes_see_rows_of_one_draw():
    whole = sample_negatives(3, 2, 12, 12, 4, torch.Generator().manual_seed(7))
    part = sample_negatives(3, 2, torch.arange(4, 8), 12, 4, torch.Generator().manual_seed(7))
    assert torch.equal(part, whole[:, :, 4:8])
