"""Laws of the regularised regression: scikit-learn's optimum at every lambda, whatever the order and the start."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relicctl.evaluation.logistic_regression import fit_logistic_regression

LAMBDAS = (1e-6, 1e-3, 0.1, 10.0, 1e4)


def points(count: int = 300, features: int = 20, classes: int = 4, apart: float = 0.6):
    """Like an encoder's features: non-negative, unequal in scale, classes that overlap."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % classes
    middles = generator.normal(size=(classes, features)) * apart
    values = (generator.normal(size=(count, features)) + middles[labels]) * np.arange(1, features + 1) ** -0.7
    return torch.from_numpy(np.maximum(values + 0.3, 0).astype(np.float32)), torch.from_numpy(labels)


def reference(x: torch.Tensor, y: np.ndarray, strength: float):
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.LogisticRegression(C=1 / strength, tol=1e-9, max_iter=100_000)
    return model.fit(x.double().numpy(), y)


def objective(logits: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, strength: float) -> float:
    nll = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
    return (nll + strength / 2 * weight.square().sum()).item()


@pytest.mark.parametrize("shape", [(300, 20, 4, 0.6), (200, 12, 2, 0.6), (40, 60, 3, 1.0)], ids=str)
def test_objective_and_predictions_are_those_of_scikit_learn(shape):
    """The last shape has more features than images: separable, so that its optimum runs far away as lambda falls."""
    x, y = points(*shape)
    found = fit_logistic_regression(x, y, LAMBDAS, shape[2])
    assert found.converged.all()
    for r, strength in enumerate(LAMBDAS):
        model = reference(x, y.numpy(), strength)
        logits = torch.from_numpy(np.atleast_2d(model.decision_function(x.double().numpy()).T).T)
        weight = torch.from_numpy(model.coef_)
        if shape[2] == 2:  # one sigmoid w is the softmax of +-w / 2, of half the penalty
            model = reference(x, y.numpy(), strength / 2)
            weight = torch.from_numpy(np.concatenate([-model.coef_, model.coef_])) / 2
            half = torch.from_numpy(model.decision_function(x.double().numpy())) / 2
            logits = torch.stack([-half, half], 1)
        best = objective(logits, weight, y, strength)
        ours = objective(found.compute_logits(x)[r], found.weight[r], y, strength)
        assert ours == pytest.approx(found.objective[r].item(), rel=1e-9)
        assert ours <= best * (1 + 1e-5)
        assert ours == pytest.approx(best, rel=1e-5)
        told = found.compute_logits(x)[r].argmax(1).numpy()
        assert (told == model.predict(x.double().numpy())).mean() >= 0.999


def test_sigmoids_are_one_vs_rest_of_scikit_learn():
    x, y = points()
    targets = torch.stack([y == 0, y != 1, (y == 2) | (y == 3)], 1)  # several classes an image
    found = fit_logistic_regression(x, targets, (0.1, 10.0), 3)
    for r, strength in enumerate((0.1, 10.0)):
        for c in range(3):
            model = reference(x, targets[:, c].numpy().astype(int), strength)
            np.testing.assert_allclose(found.weight[r, c].numpy(), model.coef_[0], atol=2e-3 * abs(model.coef_).max())
            wanted = model.decision_function(x.double().numpy())
            np.testing.assert_allclose(found.compute_logits(x)[r, :, c].numpy(), wanted, atol=2e-3 * abs(wanted).max())


def test_each_sigmoid_is_fitted_to_the_images_that_count_for_it():
    x, y = points()
    targets = torch.stack([y == 0, y != 1], 1).to(torch.int8) * 2 - 1
    assert torch.equal(
        fit_logistic_regression(x, targets, (0.1,), 2).weight, fit_logistic_regression(x, targets > 0, (0.1,), 2).weight
    )
    targets[::5, 0] = 0
    found = fit_logistic_regression(x, targets, (0.1, 10.0), 2)
    assert found.converged.all()
    for c in range(2):
        counts = targets[:, c] != 0
        alone = fit_logistic_regression(x[counts], targets[counts, c, None] > 0, (0.1, 10.0), 1)
        wanted = alone.compute_logits(x)[:, :, 0]
        torch.testing.assert_close(
            found.compute_logits(x)[:, :, c], wanted, rtol=0, atol=2e-3 * wanted.abs().max().item()
        )


def test_classes_without_an_image_leave_the_others_as_they_are():
    x, y = points()
    targets = torch.stack([y == 0, y < 0, y >= 0], 1)  # some, none and all
    found, alone = (fit_logistic_regression(x, t, (0.1, 10.0), t.shape[1]) for t in (targets, targets[:, :1]))
    assert found.converged.all()
    assert not found.compute_logits(x)[..., 1:].any()
    torch.testing.assert_close(found.compute_logits(x)[..., 0], alone.compute_logits(x)[..., 0], rtol=0, atol=2e-3)


def test_the_gradient_is_zero_at_every_lambda_of_the_sweep():
    x, y = points(count=120, features=8)
    lambdas = np.logspace(-6, 5, 45).tolist()
    found = fit_logistic_regression(x, y, lambdas, 4)
    assert found.converged.all()
    errors = found.compute_logits(x).softmax(2) - torch.nn.functional.one_hot(y, 4)
    slope = errors.mT @ x.double() + torch.tensor(lambdas, dtype=torch.float64)[:, None, None] * found.weight
    start = torch.linalg.vector_norm((torch.full((120, 4), 0.25) - torch.nn.functional.one_hot(y, 4)).T @ x)
    assert (slope.square().sum((1, 2)).sqrt() < 1e-3 * start).all()
    assert (errors.sum(1).abs() < 1e-2).all()  # the intercepts are free
    assert (found.objective.diff() > 0).all()  # a stronger penalty costs more


def test_order_and_start_do_not_matter():
    x, y = points()
    one, other = fit_logistic_regression(x, y, LAMBDAS, 4), fit_logistic_regression(x, y, LAMBDAS[::-1], 4)
    np.testing.assert_allclose(one.objective, other.objective.flip(0), rtol=1e-12)
    near = one.weight[1:2], one.bias[1:2]
    again = fit_logistic_regression(x, y, LAMBDAS[2:3], 4, start=near)
    np.testing.assert_allclose(again.objective[0], one.objective[2], rtol=1e-6)


def test_a_shift_of_all_features_changes_the_intercepts_alone():
    x, y = points()
    one, other = fit_logistic_regression(x, y, (0.1,), 4), fit_logistic_regression(x.double() + 1000.0, y, (0.1,), 4)
    np.testing.assert_allclose(one.weight, other.weight, atol=1e-3)
    np.testing.assert_allclose(one.objective, other.objective, rtol=1e-6)
    np.testing.assert_allclose(one.compute_logits(x), other.compute_logits(x.double() + 1000.0), atol=1e-2)


def test_features_without_variance_leave_the_shares_of_classes():
    y = torch.tensor([0, 0, 0, 1])
    found = fit_logistic_regression(torch.ones(4, 3), y, (1.0,), 2)
    np.testing.assert_allclose(found.compute_logits(torch.ones(1, 3))[0].softmax(1)[0], [0.75, 0.25], atol=1e-4)
