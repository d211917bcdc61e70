"""From a draft's confidence to a calibration bin: position, temperature bucket, and level of the tempered confidence.

Sequential temperature scaling (arXiv 2607.05147, section 4): position k of bucket b has one temperature T[b][k], c = sigmoid(logit / T).
Beside it stands an offset O[b][k] of the logit: a temperature cannot lower the mean of a head that is too sure of texts it never saw.
It holds only for the draft sampling that it was fitted on, hence the buckets; the counts per bin go on learning from every outcome.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

EDGES = (0.0, 0.7, 1.1)
"""Bucket 0 is greedy, 1 up to 0.7, 2 up to 1.1, 3 above."""
BUCKETS = len(EDGES) + 1
LEVELS = 16
CHAINED = 2
"""Blocks whose positions are told apart; drafts of further chained blocks share the last position."""
_UNKNOWN_RATE = 0.6


class ConfidenceBins:
    """`positions` draft positions are told apart, later ones share the last. temperatures, offsets: float64 [BUCKETS, positions].

    fitted: a drafter's calibration: `temperatures` and `offsets`, each a list of positions by bucket.
    """

    def __init__(self, positions: int, fitted: dict[str, Any] | None = None, *, known: bool = True) -> None:
        self.positions = positions
        self.temperatures: Floats = np.ones((BUCKETS, positions))
        self.offsets: Floats = np.zeros((BUCKETS, positions))
        for name, table in (("temperatures", self.temperatures), ("offsets", self.offsets)):
            for bucket, values in (fitted or {}).get(name, {}).items():
                if values:
                    count = min(len(values), positions)
                    table[int(bucket), :count] = values[:count]
                    table[int(bucket), count:] = values[-1]
        middle = (np.arange(LEVELS) + 0.5) / LEVELS if known else np.full(LEVELS, _UNKNOWN_RATE)
        self.prior: Floats = np.tile(middle, BUCKETS * positions)

    def bins(self, logits: Floats, temperatures: Floats, lengths: Ints) -> Ints:
        """int64 [S, D], -1 from each row's length on. logits: float64 [S, D]; temperatures: float64 [S], the requests' own."""
        place = np.minimum(np.arange(logits.shape[1]), self.positions - 1)
        bucket = bucket_of(temperatures)[:, None]
        confidence = sigmoid((logits - self.offsets[bucket, place]) / self.temperatures[bucket, place])
        level = np.minimum((confidence * LEVELS).astype(np.int64), LEVELS - 1)
        found = (bucket * self.positions + place) * LEVELS + level
        return np.where(np.arange(logits.shape[1]) < lengths[:, None], found, -1)


def bucket_of(temperatures: Floats) -> Ints:
    """int64, like `temperatures`."""
    return np.searchsorted(EDGES, temperatures, side="left").astype(np.int64)


def sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -60.0, 60.0))), np.float64)


def logit(probability: Floats) -> Floats:
    """The inverse of `sigmoid`; what rounded to 0 or 1 stays finite."""
    held = np.clip(probability, 1e-7, 1.0 - 1e-7)
    return np.asarray(np.log(held) - np.log1p(-held), np.float64)
