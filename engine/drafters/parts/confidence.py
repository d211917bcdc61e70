"""From a draft's confidence to a calibration bin: position, temperature bucket, and level of the tempered confidence.

Sequential temperature scaling (arXiv 2607.05147, section 4): position k of bucket b has one temperature T[b][k], c = sigmoid(logit / T).
Beside it stands an offset O[b][k] of the logit: a temperature cannot lower the mean of a head that is too sure of texts it never saw.
And the draft distribution's largest probability p has a say, by weight W[b][k]: c = sigmoid((logit + W logit(p) - O) / T). Where the
draft is spread over many tokens the target hardly agrees with one of them, and this the head, which never saw the vocabulary, can only
guess. Neither number depends on the token that is drawn, so a choice by them leaves the text's distribution as it is.
A calibration holds only for the draft sampling that it was fitted on, hence the buckets; the counts per bin go on learning from every
outcome.
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
SCALES = {"temperatures": 1.0, "offsets": 0.0, "sharpness": 0.0}
"""What a calibration holds by bucket and position, and what stands for nothing."""
CHAINED = 2
"""Blocks whose positions are told apart; drafts of further chained blocks share the last position."""
_UNKNOWN_RATE = 0.6


class ConfidenceBins:
    """`positions` draft positions are told apart, later ones share the last. scales: float64 [3, BUCKETS, positions], see `scaled`.

    fitted: a drafter's calibration: the three of `SCALES` by name, each a list of positions by bucket.
    known: whether what is binned says something of a draft's chances before any outcome is seen.
    """

    def __init__(self, positions: int, fitted: dict[str, Any] | None = None, *, known: bool = True) -> None:
        self.positions = positions
        self.scales = np.stack([spread_out(fitted or {}, bucket, positions) for bucket in range(BUCKETS)], axis=1)
        middle = (np.arange(LEVELS) + 0.5) / LEVELS if known else np.full(LEVELS, _UNKNOWN_RATE)
        self.prior: Floats = np.tile(middle, BUCKETS * positions)

    def bins(self, evidence: Floats, temperatures: Floats, lengths: Ints) -> Ints:
        """int64 [S, D], -1 from each row's length on. evidence: as in `scaled`; temperatures: float64 [S], the requests' own."""
        width = evidence.shape[1]
        place = np.minimum(np.arange(width), self.positions - 1)
        bucket = bucket_of(temperatures)[:, None]
        confidence = sigmoid(scaled(evidence, self.scales[:, bucket, place]))
        level = np.minimum((confidence * LEVELS).astype(np.int64), LEVELS - 1)
        found = (bucket * self.positions + place) * LEVELS + level
        return np.where(np.arange(width) < lengths[:, None], found, -1)


def scaled(evidence: Floats, scales: Floats | None) -> Floats:
    """float64 [S, D], logits: (confidence + weight * sharpness - offset) / temperature; the confidence alone where `scales` is None.

    evidence: float64 [S, D, 2], logits of the confidence and of the draft distribution's largest probability. scales: float64 [3, ...],
    in the order of `SCALES`, for positions [D] or rows and positions [S, D].
    """
    if scales is None:
        return np.asarray(evidence[..., 0])
    temperature, offset, weight = scales
    return np.asarray((evidence[..., 0] + weight * evidence[..., 1] - offset) / temperature)


def spread_out(calibration: dict[str, Any], bucket: int, positions: int) -> Floats:
    """float64 [3, positions] in the order of `SCALES`; positions past the fitted ones are like the last, and what was not fitted changes
    nothing.
    """
    scales = np.stack([np.full(positions, neutral) for neutral in SCALES.values()])
    for row, name in zip(scales, SCALES, strict=True):
        if values := calibration.get(name, {}).get(str(bucket)):
            row[: len(values)] = values[:positions]
            row[len(values) :] = values[-1]
    return scales


def bucket_of(temperatures: Floats) -> Ints:
    """int64, like `temperatures`."""
    return np.searchsorted(EDGES, temperatures, side="left").astype(np.int64)


def sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -60.0, 60.0))), np.float64)


def logit(probability: Floats) -> Floats:
    """The inverse of `sigmoid`; what rounded to 0 or 1 stays finite."""
    held = np.clip(probability, 1e-7, 1.0 - 1e-7)
    return np.asarray(np.log(held) - np.log1p(-held), np.float64)
