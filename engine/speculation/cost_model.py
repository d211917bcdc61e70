"""How long a step takes on this machine: t(tokens, logit rows, KV tokens), measured and refitted while running. No torch, no clock.

t = f(tokens) + a * rows + b * kv_tokens, where f is piecewise linear and never falls. f's knots are powers of two: step curves
are staircases (on two cores 4 rows cost what 16 do with one library, and half as much with another), which no straight line fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Load:
    """The size of a step. `kv_tokens` is the context length summed over its sequences."""

    tokens: int
    rows: int
    kv_tokens: int


class CostModel:
    """Least squares over decayed observations, pulled towards the last profile where nothing was observed.

    `decay` per observation: 0.99 forgets over about a hundred steps. A single step that took far longer than predicted (another process
    got the core) counts as no more than `_OUTLIER` times the prediction.
    """

    _OUTLIER = 2.0
    _PULL = 0.05
    _REFIT_EVERY = 8

    def __init__(self, max_tokens: int, *, decay: float = 0.99) -> None:
        if max_tokens < 1 or not 0.0 < decay < 1.0:
            raise ValueError(f"max_tokens >= 1 and 0 < decay < 1 must hold, got {max_tokens} and {decay}")
        size = int(np.ceil(np.log2(max(max_tokens, 2)))) + 1
        self._knots: Floats = np.exp2(np.arange(size, dtype=np.float64))
        self._decay = decay
        self._weights: Floats = np.zeros(size + 2)
        self._curve: Floats = np.zeros(size)
        self._normal: Floats = np.zeros((size + 2, size + 2))
        self._moment: Floats = np.zeros(size + 2)
        self._observed = 0

    @property
    def ready(self) -> bool:
        """Whether there is anything to predict from."""
        return self._observed > 0

    def profile(self, points: list[tuple[Load, float]]) -> None:
        """Starts from measurements (seconds) taken on purpose, ideally with several token counts. Forgets everything else."""
        loads = np.array([load.tokens for load, _ in points], np.float64)
        seconds = np.array([s for _, s in points], np.float64)
        order = np.argsort(loads)
        loads, seconds = loads[order], np.maximum.accumulate(seconds[order])
        curve = np.interp(self._knots, loads, seconds)
        if len(loads) > 1:
            # Past the last point go on at the average price of a token there: beyond a plateau steps are linear.
            curve += np.maximum(self._knots - loads[-1], 0.0) * seconds[-1] / loads[-1]
        self._weights = np.concatenate((curve, [0.0, 0.0]))
        self._normal[:] = 0.0
        self._moment[:] = 0.0
        self._observed = len(points)
        self._set_curve()

    def observe(self, load: Load, seconds: float) -> None:
        """Learns from one step that ran."""
        if not self.ready:
            self.profile([(load, seconds)])
        seconds = min(seconds, self._OUTLIER * self.predict(load))
        row = self._features(load)
        scale = 1.0 / max(seconds, 1e-9)  # relative errors: a short step is as telling as a long one
        self._normal = self._decay * self._normal + np.outer(row, row) * scale**2
        self._moment = self._decay * self._moment + row * seconds * scale**2
        self._observed += 1
        if self._observed % self._REFIT_EVERY == 0:
            self._refit()

    def predict(self, load: Load) -> float:
        """Seconds."""
        return float(self.curve(np.array([load.tokens]))[0] + self._weights[-2] * load.rows + self._weights[-1] * load.kv_tokens)

    def curve(self, tokens: NDArray[np.int64]) -> Floats:
        """Seconds that depend on the number of tokens alone; [N] -> [N], never falling."""
        beyond = np.maximum(tokens - self._knots[-1], 0.0) * self._curve[-1] / self._knots[-1]
        return np.asarray(np.interp(tokens, self._knots, self._curve) + beyond)

    @property
    def seconds_per_row(self) -> float:
        return float(self._weights[-2])

    def _features(self, load: Load) -> Floats:
        row = np.zeros(len(self._weights))
        place = min(float(np.log2(max(load.tokens, 1))), len(self._knots) - 1.0)
        low = min(int(place), len(self._knots) - 2)
        share = (min(load.tokens, self._knots[-1]) - self._knots[low]) / (self._knots[low + 1] - self._knots[low])
        row[low], row[low + 1], row[-2], row[-1] = 1.0 - share, share, load.rows, load.kv_tokens
        return row

    def _refit(self) -> None:
        prior = self._weights.copy()
        # Each weight is held to its last value as if by a few observations of its own size.
        typical = np.maximum(prior, 1e-9)
        typical[-2:] = max(float(prior[:-2].max()), 1e-9) / self._knots[-1]
        hold = self._PULL / typical**2
        weights = np.linalg.solve(self._normal + np.diag(hold), self._moment + hold * prior)
        self._weights = np.maximum(weights, 0.0)
        self._set_curve()

    def _set_curve(self) -> None:
        self._curve = np.maximum.accumulate(self._weights[:-2])
