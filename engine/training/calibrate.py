"""Sequential temperature scaling (arXiv 2607.05147, section 4) with an offset and the draft's sharpness, and how good a calibration is.

Evidence of N blocks is float64 [N, K, 2]; it and what scales it are `engine.drafters.parts.confidence`'s. Numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.drafters.parts.confidence import scaled, sigmoid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

BINS = 15
_FARTHEST, _HALVINGS = 12.0, 24
"""Of the search for an offset: logits from which it begins to either side, and its steps."""
_CANDIDATES: Floats = np.exp(np.linspace(np.log(0.2), np.log(12.0), 121))
_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the sharpness beside the confidence."""
_NEWTON, _RIDGE = 12, 1e-3
"""Steps of a logistic regression, and what keeps it finite."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Of the predicted chance that drafts 1..k all stand, at each position k. ece: over 15 bins of equal mass. auc: NaN with one class."""

    ece: Floats
    brier: Floats
    base_brier: Floats
    auc: Floats


def fit(evidence: Floats, stood: Floats) -> Floats:
    """[3, K], scales of the `evidence`, left to right. A position's weight of the sharpness tells best (by likelihood) which drafts stand
    of those whose predecessors did; its temperature and offset then make the product so far best calibrated against `stood`. Of every
    temperature the offset is the one that makes the mean right, so that search is over one number.

    stood: [N, K], 1 where drafts 1..k all stand. Every position is known for every block: after a rejection it is 0.
    """
    count = stood.shape[1]
    scales = np.zeros((3, count))
    before = np.ones(len(stood))
    reached = np.ones(len(stood), bool)
    for position in range(count):
        wanted = stood[:, position]
        both = evidence[:, position]
        weight = min(_WEIGHTS, key=lambda one: _loss(both[reached, 0] + one * both[reached, 1], wanted[reached]))
        column, reached = both[:, 0] + weight * both[:, 1], wanted > 0.5
        offsets = [_offset(column, before, float(wanted.mean()), t) for t in _CANDIDATES]
        errors = [expected_error(before * sigmoid((column - o) / t), wanted) for t, o in zip(_CANDIDATES, offsets, strict=True)]
        best = int(np.argmin(errors))
        scales[:, position] = _CANDIDATES[best], offsets[best], weight
        before = before * sigmoid((column - offsets[best]) / _CANDIDATES[best])
    return scales


def _loss(score: Floats, stood: Floats) -> float:
    """Mean log loss of the best logistic regression on one score; 0 of nothing."""
    if not len(score):
        return 0.0
    columns = np.stack([score, np.ones_like(score)])
    found = np.zeros(2)
    for _ in range(_NEWTON):
        chance = sigmoid(found @ columns)
        curvature = (columns * (chance * (1.0 - chance))) @ columns.T / len(score) + _RIDGE * np.eye(2)
        found = found + np.linalg.solve(curvature, columns @ (stood - chance) / len(score) - _RIDGE * found)
    at = found @ columns
    return float((np.logaddexp(0.0, at) - stood * at).mean())


def _offset(logits: Floats, before: Floats, wanted: float, temperature: float) -> float:
    """By bisection: with it the product's mean is what stood. Where nothing or everything stood, the end of the range."""
    low, high = -_FARTHEST, _FARTHEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        too_sure = float((before * sigmoid((logits - middle) / temperature)).mean()) > wanted
        low, high = (middle, high) if too_sure else (low, middle)
    return (low + high) / 2.0


def survival(evidence: Floats, scales: Floats | None = None) -> Floats:
    """float64 [N, K]: the predicted chance that drafts 1..k all stand, by evidence that is scaled or taken as it is."""
    return np.asarray(np.cumprod(sigmoid(scaled(evidence, scales)), axis=1), np.float64)


def quality(predicted: Floats, stood: Floats) -> Quality:
    """Of the predicted chances [N, K] that drafts 1..k all stand, beside whether they did."""
    columns = range(stood.shape[1])
    base = stood.mean(axis=0)
    return Quality(
        ece=np.array([expected_error(predicted[:, k], stood[:, k]) for k in columns]),
        brier=((predicted - stood) ** 2).mean(axis=0),
        base_brier=base * (1.0 - base),
        auc=np.array([area(predicted[:, k], stood[:, k]) for k in columns]),
    )


def expected_error(predicted: Floats, stood: Floats) -> float:
    """Expected calibration error over `BINS` bins of equal mass."""
    order = np.argsort(predicted, kind="stable")
    gaps = [
        abs(float(predicted[part].mean() - stood[part].mean())) * len(part)
        for part in np.array_split(order, min(BINS, len(order)))
        if len(part)
    ]
    return sum(gaps) / max(len(predicted), 1)


def reliability(predicted: Floats, stood: Floats) -> list[tuple[Floats, Floats]]:
    """Of the same, by position: (mean predicted chance, share that stood), float64 [bins] each, of bins of equal mass."""
    found = []
    for position in range(stood.shape[1]):
        parts = [part for part in np.array_split(np.argsort(predicted[:, position], kind="stable"), min(BINS, len(stood))) if len(part)]
        means = [[column[part, position].mean() for part in parts] for column in (predicted, stood)]
        found.append((np.array(means[0]), np.array(means[1])))
    return found


def area(predicted: Floats, stood: Floats) -> float:
    """Area under the ROC curve, ties counting half."""
    positive, negative = predicted[stood > 0.5], predicted[stood <= 0.5]
    if not len(positive) or not len(negative):
        return float("nan")
    ordered = np.sort(negative)
    below, upto = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
    return float((below + upto).mean() / 2.0 / len(negative))
