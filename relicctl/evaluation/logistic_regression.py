"""L2-regularised logistic regression for many regularisation strengths in one solve.

For every lambda it minimises, over weights W ``[C, F]`` and intercepts b ``[C]``,

    J(W, b) = sum_i loss(W x_i + b, y_i) + lambda / 2 |W|^2

where the loss is the cross-entropy of a softmax (single-label) or of C sigmoids (one-vs-rest or multi-label, each over
the images that are not ignored for it). The sum is over images and b is not penalised, so lambda = 1 / C of
scikit-learn's LogisticRegression.

Newton's method: the features are centred and rotated to their principal axes once for all lambdas (which leaves |W|
as it is), so that the Hessian is well preconditioned by its diagonal. Lambdas are solved from strong to weak in waves;
each wave starts at an extrapolation, in log lambda, of the solutions before. All lambdas of a wave share every matrix
product, and each leaves the wave when it has converged. Directions come from conjugate gradients in float32; the
objective, its gradient and the line search are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

WAVE_SIZE = 4  # lambdas solved at once: a wider wave shares more, but starts farther from the optima
NEWTON_TOLERANCE = 1e-7  # relative decrease of the objective that the last Newton step may still predict
CG_TOLERANCE = 0.1  # relative residual at which a direction is good enough
NEWTON_STEPS, CG_STEPS, LINE_SEARCH_STEPS = 100, 200, 40
EIGENVALUE_CUTOFF = 1e-14  # of the largest eigenvalue: axes below hold rounding errors of float32 features


@dataclass(frozen=True)
class LogisticModels:
    """For R lambdas, in the order given: ``weight`` ``[R, C, F]``, ``bias`` ``[R, C]``, ``objective`` ``[R]``, float64.

    ``converged``: bool ``[R]``; False where ``NEWTON_STEPS`` were not enough.
    """

    lambdas: tuple[float, ...]
    weight: Tensor
    bias: Tensor
    objective: Tensor
    converged: Tensor

    def compute_logits(self, features: Tensor) -> Tensor:
        """``[N, F]`` -> ``[R, N, C]``, float64."""
        return features.double() @ self.weight.mT + self.bias[:, None]


def fit_logistic_regression(
    features: Tensor, targets: Tensor, lambdas: Sequence[float], classes: int, start: Sequence[Tensor] | None = None
) -> LogisticModels:
    """Fit ``features`` ``[N, F]``: ``targets`` int64 ``[N]`` for a softmax, or ``[N, C]`` for C sigmoids.

    For sigmoids they are bool, or int8 of 1 and -1, and 0 where an image is ignored for a class. A class that all or
    none of the images have has its optimum at infinity: it is left out, and its logits are 0.
    ``start``: weight and bias of a similar problem's solutions, one for each lambda, to start from.
    """
    x = features.double()
    mean = x.mean(0)
    axes = _compute_principal_axes(x - mean)
    problem = _LogisticObjective((x - mean) @ axes, targets, classes)
    order = sorted(range(len(lambdas)), key=lambda r: -lambdas[r])
    sorted_lambdas = x.new_tensor([lambdas[r] for r in order])
    if start is None:
        coefficients = x.new_zeros(classes, len(order), axes.shape[1] + 1)
    else:
        weight, bias = start[0] @ axes, start[1] + start[0] @ mean
        coefficients = torch.cat([weight, bias[..., None]], 2)[order].transpose(0, 1).contiguous()
    values, converged = x.new_zeros(len(order)), torch.zeros(len(order), dtype=torch.bool, device=x.device)
    for first in range(0, len(order), WAVE_SIZE):
        wave = slice(first, first + WAVE_SIZE)
        if start is None:
            coefficients[:, wave] = _extrapolate_start(problem, sorted_lambdas, coefficients, wave)
        coefficients[:, wave], values[wave], converged[wave] = _run_newton(
            problem, sorted_lambdas[wave], coefficients[:, wave]
        )
    back = torch.tensor(order, device=x.device).argsort()
    weight = coefficients[:, back, :-1].transpose(0, 1) @ axes.T
    bias = coefficients[:, back, -1].T - weight @ mean
    return LogisticModels(tuple(lambdas), weight, bias, values[back], converged[back])


class _LogisticObjective:
    """The objective on principal axes. Coefficients are ``[C, R, F + 1]``, the intercept last; logits ``[C, R, N]``.

    Classes come first, so that sums over them run along contiguous rows.
    """

    def __init__(self, rotated: Tensor, targets: Tensor, classes: int) -> None:
        self.x = torch.cat([rotated, rotated.new_ones(len(rotated), 1)], 1)
        self.x32 = self.x.float()
        self._squares = self.x32.square()
        self.softmax = targets.ndim == 1
        truth = one_hot(targets, classes).bool() if self.softmax else targets > 0
        valid = torch.ones_like(truth) if targets.dtype == torch.bool or self.softmax else targets != 0
        if not self.softmax:
            valid &= (truth & valid).any(0) & (~truth & valid).any(0)
        self._truth = _to_class_first(truth & valid)
        self._valid = None if bool(valid.all()) else _to_class_first(valid)
        self.penalized = torch.ones_like(self.x[0])
        self.penalized[-1] = 0

    def compute_logits(self, coefficients: Tensor) -> Tensor:
        return _apply_matrix(coefficients, self.x.T)

    def compute_objective(self, coefficients: Tensor, logits: Tensor, lambdas: Tensor) -> Tensor:
        """``[R]``."""
        losses = logits.logsumexp(0) if self.softmax else self._zero_ignored(softplus(logits)).sum(0)
        penalty = (coefficients.square() * self.penalized).sum((0, 2))
        return (losses - (logits * self._truth).sum(0)).sum(1) + lambdas / 2 * penalty

    def compute_gradient(self, coefficients: Tensor, logits: Tensor, lambdas: Tensor) -> Tensor:
        errors = self._compute_probabilities(logits) - self._truth
        return _apply_matrix(errors, self.x) + lambdas[:, None] * self.penalized * coefficients

    def compute_direction(self, gradient: Tensor, logits: Tensor, lambdas: Tensor) -> Tensor:
        """Return about -H^-1 g, by preconditioned conjugate gradients for all lambdas at once."""
        probabilities = self._compute_probabilities(logits).float()
        slope = probabilities * (1 - probabilities)
        ridge = (lambdas[:, None] * self.penalized).float()
        diagonal = _apply_matrix(slope, self._squares) + ridge
        diagonal += 1e-7 * diagonal.amax((0, 2), keepdim=True)  # confidently predicted classes have almost no curvature

        def apply_hessian(vector: Tensor) -> Tensor:
            change = _apply_matrix(vector, self.x32.T)
            change = probabilities * (change - (probabilities * change).sum(0)) if self.softmax else slope * change
            return _apply_matrix(change, self.x32) + ridge * vector

        def apply_preconditioner(vector: Tensor) -> Tensor:
            scaled = vector / diagonal
            return scaled - scaled.mean(0) if self.softmax else scaled  # a shift of all classes changes nothing

        residual = -gradient.float()
        direction = torch.zeros_like(residual)
        scaled = apply_preconditioner(residual)
        search, before = scaled, _compute_dot(residual, scaled)
        target = before * CG_TOLERANCE**2
        for _ in range(CG_STEPS):
            curved = apply_hessian(search)
            length = (before / _compute_dot(search, curved).clamp_min(1e-30))[:, None]
            direction += length * search
            residual = residual - length * curved
            scaled = apply_preconditioner(residual)
            now = _compute_dot(residual, scaled)
            if bool((now <= target).all()):
                break
            search, before = scaled + (now / before.clamp_min(1e-30))[:, None] * search, now
        return direction.double()

    def _compute_probabilities(self, logits: Tensor) -> Tensor:
        """Return class probabilities; 0 where an image is ignored, so that errors and slopes are 0 there too."""
        return logits.softmax(0) if self.softmax else self._zero_ignored(logits.sigmoid())

    def _zero_ignored(self, values: Tensor) -> Tensor:
        return values if self._valid is None else values * self._valid


def _run_newton(problem: _LogisticObjective, lambdas: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run Newton's method from ``start`` ``[C, R, F + 1]``; return coefficients, objectives, and which converged."""
    coefficients, logits = start.clone(), problem.compute_logits(start)
    values = problem.compute_objective(coefficients, logits, lambdas)
    active = torch.arange(len(lambdas), device=lambdas.device)
    for _ in range(NEWTON_STEPS):
        x, x_logits, active_lambdas, value = coefficients[:, active], logits[:, active], lambdas[active], values[active]
        gradient = problem.compute_gradient(x, x_logits, active_lambdas)
        step = problem.compute_direction(gradient, x_logits, active_lambdas)
        slope = _compute_dot(gradient, step)
        change = problem.compute_logits(step)
        length = torch.ones_like(slope)[:, None]
        for _ in range(LINE_SEARCH_STEPS):
            after = problem.compute_objective(x + length * step, x_logits + length * change, active_lambdas)
            short = after > value + 1e-4 * length[:, 0] * slope + 1e-13 * value
            if not bool(short.any()):
                break
            length = torch.where(short[:, None], length / 2, length)
        coefficients[:, active], logits[:, active] = x + length * step, x_logits + length * change
        values[active] = after
        active = active[-slope / 2 > NEWTON_TOLERANCE * after]
        if not len(active):
            break
    converged = torch.ones_like(lambdas, dtype=torch.bool)
    converged[active] = False
    return coefficients, values, converged


def _extrapolate_start(problem: _LogisticObjective, lambdas: Tensor, coefficients: Tensor, wave: slice) -> Tensor:
    """Return where a wave starts: the parabola in log lambda through three solutions, or the last one if better."""
    known = slice(max(0, wave.start - 3), wave.start)
    x, at = lambdas[known].log(), lambdas[wave].log()
    if not len(x):
        return coefficients[:, wave]
    last = coefficients[:, wave.start - 1, None].expand(-1, len(at), -1)
    factors = torch.ones(len(at), len(x), dtype=x.dtype, device=x.device)  # Lagrange's
    for i in range(len(x)):
        for j in range(len(x)):
            if i != j:
                factors[:, i] *= (at - x[j]) / (x[i] - x[j])
    parabola = torch.einsum("ri,cif->crf", factors, coefficients[:, known])
    values = [problem.compute_objective(c, problem.compute_logits(c), lambdas[wave]) for c in (parabola, last)]
    return torch.where((values[0] < values[1])[:, None], parabola, last)


def _compute_principal_axes(centred: Tensor) -> Tensor:
    """Return an orthonormal basis ``[F, r]`` of what ``centred`` ``[N, F]`` spans."""
    is_wide = len(centred) < centred.shape[1]  # then through the smaller Gram matrix
    eigenvalues, vectors = torch.linalg.eigh(centred @ centred.T if is_wide else centred.T @ centred)
    axes: Tensor = vectors[:, eigenvalues > EIGENVALUE_CUTOFF * eigenvalues[-1]]
    return torch.linalg.qr(centred.T @ axes).Q if is_wide else axes


def _to_class_first(matrix: Tensor) -> Tensor:
    """``[N, C]`` -> float64 ``[C, 1, N]``."""
    return matrix.double().T[:, None].contiguous()


def _apply_matrix(rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply ``[C, R, A]`` by ``[A, B]`` as one matrix product."""
    return (rows.reshape(-1, rows.shape[-1]) @ matrix).view(*rows.shape[:2], -1)


def _compute_dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner products of coefficients, ``[R]``."""
    return (one * other).sum((0, 2))
