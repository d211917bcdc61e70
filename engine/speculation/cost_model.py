"""How long a step takes on this machine: t(tokens, logit rows, KV tokens, pairs), measured and refitted while running. No torch, no clock.

t = speed * (f(tokens) + a * rows + b * kv_tokens + c * pairs), where f is piecewise linear and never falls. f's knots are powers of two:
step curves are staircases (on two cores 4 rows cost what 16 do with one library, and half as much with another), which no straight line
fits. `speed` follows what changes from one minute to the next for all steps alike: clocks, and neighbours on the memory bus.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Load:
    """The size of a step. `kv_tokens`: the context length summed over its sequences; `pairs`: the positions that each row sees, summed."""

    tokens: int
    rows: int
    kv_tokens: int
    pairs: int = 0

    def covers(self, other: Load) -> bool:
        """Whether it is at least as large in every way."""
        return all(ours >= theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True))


class CostModel:
    """Least squares over decayed observations, held to the profile where little was observed.

    `decay` per observation: 0.95 forgets over about twenty steps. Steps say little alone (a neighbour on the memory bus slows some of them,
    another process takes the core in others), so an observation moves the model as if it were off by as much as steps usually are, at
    most: what is followed is nearer to the median step than to the mean.
    """

    _SPEED = 0.1
    """How quickly `speed` and the usual error follow."""
    _LEAST_USUAL = 0.1
    _PULL = 0.1
    """Weight of the profile against one observation."""
    _TIE = 2.0
    """Weight of neighbouring knots being off from the profile by the same factor: what a draft adds is a small difference of two large
    times, so a size that is seen often must not come down alone."""
    _PROFILE_PULL = 1e-3

    def __init__(self, max_tokens: int, *, decay: float = 0.95) -> None:
        if max_tokens < 1 or not 0.0 < decay < 1.0:
            raise ValueError(f"max_tokens >= 1 and 0 < decay < 1 must hold, got {max_tokens} and {decay}")
        size = int(np.ceil(np.log2(max(max_tokens, 2)))) + 1
        self._knots: Floats = np.exp2(np.arange(size, dtype=np.float64))
        self._decay = decay
        self._profile: Floats = np.zeros(size + 3)
        self._weights: Floats = self._profile
        self._normal: Floats = np.zeros((size + 3, size + 3))
        self._moment: Floats = np.zeros(size + 3)
        self._tie: Floats = np.zeros_like(self._normal)
        self._speed = 0.0
        """Its logarithm."""
        self._usual = 0.0
        self._ready = False

    @property
    def ready(self) -> bool:
        """Whether there is anything to predict from."""
        return self._ready

    @property
    def slowness(self) -> float:
        """How many times as long as its weights say everything takes just now: see `speed`."""
        return math.exp(self._speed)

    def profile(self, points: list[tuple[Load, float]]) -> None:
        """Starts from measurements (seconds) taken on purpose, ideally with several token counts. Forgets everything else."""
        tokens = np.array(sorted({load.tokens for load, _ in points}), np.float64)
        fastest = [min(seconds for load, seconds in points if load.tokens == count) for count in tokens]
        curve = np.interp(self._knots, tokens, np.maximum.accumulate(fastest))
        if len(tokens) > 1:
            # Past the last point go on at the average price of a token there: beyond a plateau steps are linear.
            curve += np.maximum(self._knots - tokens[-1], 0.0) * curve[-1] / tokens[-1]
        start = np.concatenate((curve, np.zeros(3)))
        features = np.array([self._features(load) / seconds for load, seconds in points])
        hold = self._PROFILE_PULL / self._sizes(start) ** 2
        self._profile = self._weights = _not_negative(
            features.T @ features + np.diag(hold), features.sum(axis=0) + hold * start, len(self._knots)
        )
        apart = np.diff(np.eye(len(self._knots), len(start)), axis=0) / self._sizes(self._profile)
        self._tie = self._TIE * apart.T @ apart
        self._normal[:] = 0.0
        self._moment[:] = 0.0
        self._speed = self._usual = 0.0
        self._ready = True

    def observe(self, load: Load, seconds: float) -> None:
        """Learns from one step that ran."""
        if not self._ready:
            self.profile([(load, seconds)])
        error = math.log(max(seconds, 1e-9) / self.predict(load))
        bound = max(self._usual, self._LEAST_USUAL)
        self._usual += self._SPEED * (min(abs(error), math.log(2.0)) - self._usual)
        taken = min(max(error, -bound), bound)
        seen = self.predict(load) * math.exp(taken)
        self._speed += self._SPEED * taken
        row = self._features(load) * self.slowness / seen  # relative errors: a short step is as telling as a long one
        self._normal = self._decay * self._normal + np.outer(row, row)
        self._moment = self._decay * self._moment + row
        hold = self._PULL / self._sizes(self._profile) ** 2
        normal = self._normal + np.diag(hold) + self._tie
        self._weights = _not_negative(normal, self._moment + hold * self._profile, len(self._knots))

    def predict(self, load: Load) -> float:
        """Seconds."""
        return float(self._features(load) @ self._weights) * self.slowness

    def curve(self, tokens: NDArray[np.int64]) -> Floats:
        """Seconds that depend on the number of tokens alone; [N] -> [N], never falling."""
        curve = self._weights[:-3]
        beyond = np.maximum(tokens - self._knots[-1], 0.0) * curve[-1] / self._knots[-1]
        return np.asarray((np.interp(tokens, self._knots, curve) + beyond) * self.slowness)

    @property
    def seconds_per_row(self) -> float:
        return float(self._weights[-3]) * self.slowness

    @property
    def seconds_per_pair(self) -> float:
        return float(self._weights[-1]) * self.slowness

    def _features(self, load: Load) -> Floats:
        row = np.zeros(len(self._weights))
        tokens = min(float(load.tokens), float(self._knots[-1]))
        low = min(int(math.log2(max(tokens, 1.0))), len(self._knots) - 2)
        share = (tokens - self._knots[low]) / (self._knots[low + 1] - self._knots[low])
        row[low], row[low + 1] = 1.0 - share, share
        row[:-3] *= max(load.tokens / float(self._knots[-1]), 1.0)
        row[-3:] = load.rows, load.kv_tokens, load.pairs
        return row

    def _sizes(self, weights: Floats) -> Floats:
        """What each weight is held by: its own size, for the last three at least what would make up a small part of a large step."""
        sizes = np.maximum(weights, 1e-12)
        token = max(float(weights[len(self._knots) - 1]), 1e-9) / self._knots[-1]
        sizes[-3:] = np.maximum(weights[-3:], token / np.array([20.0, 1000.0, 1000.0]))
        return sizes


_LEVEL = 0.99
"""Of the highest rate: what reaches it is as good."""
_CLEARLY = 1.03
"""How much faster smaller steps must be than the largest: measured step times are off by nearly as much."""
_LEAST_BATCH, _LEAST_CHUNK = 16, 64
"""Fewer sequences hold little, and smaller pieces of a prompt are nowhere faster: what a profile says there is its noise."""
_USUAL_CONTEXT = 160
"""Tokens of a decoding sequence where nothing is known of the job; the profile has steps of that context."""


def best_batch(cost: CostModel, most: int) -> int:
    """How many sequences should decode together, `most` at most: the fewest that reach the highest rate. More would only hold KV."""
    sizes = _sizes(_LEAST_BATCH, most)
    rates = [size / cost.predict(Load(size, size, size * _USUAL_CONTEXT, size * _USUAL_CONTEXT)) for size in sizes]
    return next(size for size, rate in zip(sizes, rates, strict=True) if rate >= _LEVEL * max(rates))


def best_chunk(cost: CostModel, most: int) -> int:
    """How many prompt tokens a step should take in, `most` at most: `most`, unless prompts are clearly read faster in smaller pieces.

    Smaller pieces of one prompt read the beginning of it again, so all sizes are held to the same positions: those of the largest.
    """
    sizes = _sizes(_LEAST_CHUNK, most)
    rates = [size / cost.predict(Load(size, 1, most // 2, size * most // 2)) for size in sizes]
    fastest = max(range(len(sizes)), key=rates.__getitem__)
    return sizes[fastest] if rates[fastest] > _CLEARLY * rates[-1] else most


def _sizes(least: int, most: int) -> list[int]:
    """Powers of two from `least` on below `most`, and `most`."""
    return [*(1 << power for power in range((least - 1).bit_length(), (most - 1).bit_length())), most]


def _not_negative(normal: Floats, moment: Floats, knots: int) -> Floats:
    """Least squares; what comes out negative is zero and the rest solved again. The first `knots` weights are made never to fall."""
    free = moment != 0.0
    weights = np.zeros(len(moment))
    while free.any():
        weights[:] = 0.0
        weights[free] = np.linalg.solve(normal[np.ix_(free, free)], moment[free])
        if not (weights < 0.0).any():
            break
        free &= weights > 0.0
    weights[:knots] = np.maximum.accumulate(weights[:knots])
    return weights
