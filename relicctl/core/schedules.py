"""Learning rate and target decay as pure functions of the step: nothing to save, nothing to resume wrongly.

Step k of a run of K steps counts from 0; k = K is the state after the last step.
"""

from __future__ import annotations

import math


def compute_learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear from 0 to ``peak``, reached at ``warmup_steps``, then half a cosine to 0 at ``total_steps``."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return peak * (1.0 + math.cos(math.pi * progress)) / 2.0


def compute_ema_gamma(step: int, *, gamma0: float, total_steps: int) -> float:
    """Decay of the target: ``gamma0`` at step 0, half a cosine to 1 at ``total_steps`` (BYOL, 3.2)."""
    progress = min(step / total_steps, 1.0)
    return 1.0 - (1.0 - gamma0) * (1.0 + math.cos(math.pi * progress)) / 2.0
