"""Step seconds of a recorded run as a formula: t = f(tokens) + a * rows + b * kv_tokens + c * pairs, all steps at once.

The engine's own `CostModel` learns step by step and forgets; this one looks back on the whole run, so that what judges a policy in virtual
time is not the same estimate that the policy decides by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from engine.speculation.cost_model import Load

    Floats = NDArray[np.float64]

_ROUNDS = 5
_TYPICAL = 1.5
"""A relative residual this many times the median one gets less weight, in proportion: a step that lost its core says little."""
_HOLD = 1e-3
"""Weight of what was known before against one observation: decides only where there are none."""


class StepFit:
    """f is piecewise linear with knots at the powers of two; least squares on relative errors, outliers weighted down, nothing negative.

    `prior`: (load, seconds) measured on purpose; f is drawn to it where no step was seen.
    """

    def __init__(self, steps: Sequence[tuple[Load, float]], prior: Sequence[tuple[Load, float]] = ()) -> None:
        points = [*steps, *prior]
        if not points:
            raise ValueError("a machine cannot be fitted to no steps at all")
        largest = max(load.tokens for load, _ in points)
        self._knots: Floats = np.exp2(np.arange(int(np.ceil(np.log2(max(largest, 2)))) + 1))
        start = np.concatenate((self._start([*prior] or points), [0.0, 0.0, 0.0]))
        self._weights = self._fit(steps, start) if steps else start

    def seconds(self, load: Load) -> float:
        beyond = max(load.tokens / float(self._knots[-1]), 1.0)
        return float(self._features([load])[0] @ self._weights) * beyond

    def _start(self, points: Sequence[tuple[Load, float]]) -> Floats:
        tokens = np.array([load.tokens for load, _ in points], np.float64)
        order = np.argsort(tokens)
        seconds = np.array([value for _, value in points])[order]
        beyond = np.maximum(self._knots / tokens[order][-1], 1.0)
        return np.asarray(np.interp(self._knots, tokens[order], seconds) * beyond)

    def _features(self, loads: Sequence[Load]) -> Floats:
        tokens = np.minimum([load.tokens for load in loads], self._knots[-1])
        hats = np.array([np.interp(tokens, self._knots, row) for row in np.eye(len(self._knots))]).T
        rest = np.array([(load.rows, load.kv_tokens, load.pairs) for load in loads], np.float64)
        return np.hstack((hats, rest))

    def _fit(self, steps: Sequence[tuple[Load, float]], start: Floats) -> Floats:
        seconds = np.maximum([value for _, value in steps], 1e-9)
        features = self._features([load for load, _ in steps]) / seconds[:, None]
        scale = np.maximum(np.abs(features).max(axis=0), 1e-30)
        features /= scale
        known = start * scale
        trust = np.ones(len(steps))
        weights = known
        for _ in range(_ROUNDS):
            weights = _not_negative(features, trust, known)
            residual = np.abs(features @ weights - 1.0)
            limit = _TYPICAL * max(float(np.median(residual)), 1e-6)
            trust = np.minimum(1.0, limit / np.maximum(residual, 1e-12))
        return np.asarray(weights / scale)


def _not_negative(features: Floats, trust: Floats, known: Floats) -> Floats:
    """Weighted least squares held to `known`; what comes out negative is set to zero and the rest solved again."""
    free = np.ones(features.shape[1], bool)
    normal = (features.T * trust) @ features + _HOLD * np.eye(len(free))
    moment = (features.T * trust).sum(axis=1) + _HOLD * known
    weights = np.zeros(len(free))
    while free.any():
        weights[:] = 0.0
        weights[free] = np.linalg.solve(normal[np.ix_(free, free)], moment[free])
        if not (weights < 0.0).any():
            break
        free &= weights > 0.0
    return weights
