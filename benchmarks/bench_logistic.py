"""The sweep over 45 lambdas against scikit-learn's loop over the same 45, on the same features, in one run.

    python benchmarks/bench_logistic.py [--features FILE.npz] [--threads 2] [--warm]

Features: 10,000 x 512 of 10 classes, non-negative, correlated and with a falling spectrum as an encoder's are, or
arrays x and y of a file. scikit-learn solves by its default, L-BFGS, each lambda with the loosest tolerance
of 1e-2, 1e-3, ... at which its objective comes within 1e-5 (relative) of ours; only that last fit is timed.
Agreement of predictions is with those fits, so it says how far theirs are from their own optimum, too.
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from relicctl.evaluation.logistic_regression import fit_logistic_regression

LAMBDAS = np.logspace(-6, 5, 45)
EQUAL = 1e-5


def generate_features() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 10_000)
    middles = generator.normal(size=(10, 512)) / 4
    spectrum = 3 * np.arange(1, 513) ** -0.7
    turned, _ = np.linalg.qr(generator.normal(size=(512, 512)))
    points = (generator.normal(size=(10_000, 512)) + middles[labels]) * spectrum
    return np.maximum(points @ turned + 0.05, 0).astype(np.float32), labels


def objective(model: LogisticRegression, x: np.ndarray, y: np.ndarray, strength: float) -> float:
    logits = x @ model.coef_.T + model.intercept_
    nll = torch.from_numpy(logits).logsumexp(1).sum().item() - logits[np.arange(len(y)), y].sum()
    return float(nll + strength / 2 * np.square(model.coef_).sum())


class Loop:
    """scikit-learn's fits, from strong to weak; ``warm``: each starts at the solution before it."""

    def __init__(self, x: np.ndarray, y: np.ndarray, warm: bool) -> None:
        self._x, self._y, self._warm = x, y, warm
        self._before: LogisticRegression | None = None
        self._looseness = -2
        self.seconds = 0.0

    def fit(self, strength: float, wanted: float) -> tuple[LogisticRegression, float]:
        """The model of one lambda, and its objective / ``wanted`` - 1. Tolerances that turn out too loose are free."""
        for power in range(min(-2, self._looseness + 1), -13, -1):
            model = LogisticRegression(C=1 / strength, tol=10.0**power, max_iter=100_000, warm_start=self._warm)
            if self._warm and self._before is not None:
                model.coef_, model.intercept_ = self._before.coef_.copy(), self._before.intercept_.copy()
                model.classes_ = self._before.classes_
            started = time.perf_counter()
            model.fit(self._x, self._y)
            seconds = time.perf_counter() - started
            gap = objective(model, self._x, self._y, strength) / wanted - 1
            if gap <= EQUAL:
                break
        self._before, self._looseness = model, power
        self.seconds += seconds
        return model, gap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", help=".npz with x [N, F] and y [N]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm", action="store_true", help="scikit-learn starts each lambda at the solution before")
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    torch.set_num_threads(args.threads)
    x, y = generate_features() if args.features is None else (np.load(args.features)[k] for k in "xy")
    print(f"{x.shape[0]} x {x.shape[1]}, {y.max() + 1} classes, {args.threads} threads")

    features, labels = torch.from_numpy(x), torch.from_numpy(y)
    fit_logistic_regression(features[:500], labels[:500], LAMBDAS[-2:].tolist(), 10)  # warm-up
    ours = []
    for _ in range(2):  # on a shared machine they differ; the slower one counts
        started = time.perf_counter()
        found = fit_logistic_regression(features, labels, LAMBDAS.tolist(), int(y.max()) + 1)
        ours.append(time.perf_counter() - started)
    print(f"ours: {ours[0]:.2f} s and {ours[1]:.2f} s, all converged: {bool(found.converged.all())}", flush=True)

    wide = x.astype(np.float64)
    loop, gaps, agreement = Loop(wide, y, args.warm), [], 1.0
    predicted = found.compute_logits(features).argmax(2).numpy()
    with threadpool_limits(args.threads):
        for r in reversed(range(len(LAMBDAS))):
            model, gap = loop.fit(LAMBDAS[r], found.objective[r].item())
            gaps.append(gap)
            agreement = min(agreement, float((model.predict(wide) == predicted[r]).mean()))
            print(f"lambda {LAMBDAS[r]:8.2g}  {loop.seconds:7.1f} s so far  gap {gap:+.1e}", flush=True)
    print(f"objectives differ by {min(gaps):+.1e} to {max(gaps):+.1e}; least agreement of predictions {agreement:.4f}")
    print(f"scikit-learn {loop.seconds:.1f} s / ours {max(ours):.2f} s = {loop.seconds / max(ours):.1f}")


if __name__ == "__main__":
    main()
