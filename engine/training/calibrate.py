"""Sequential temperature scaling (arXiv 2607.05147, section 4), and how good a calibration is. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.drafters.parts.confidence import sigmoid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

BINS = 15
_CANDIDATES: Floats = np.exp(np.linspace(np.log(0.2), np.log(6.0), 121))


@dataclass(frozen=True, slots=True)
class Quality:
    """Of the predicted chance that drafts 1..k all stand, at each position k. ece: over 15 bins of equal mass. auc: NaN with one class."""

    ece: Floats
    brier: Floats
    base_brier: Floats
    auc: Floats


def fit(logits: Floats, stood: Floats) -> Floats:
    """Temperatures [K] of confidence `logits` [N, K], left to right: each makes the product so far best calibrated against `stood`.

    stood: [N, K], 1 where drafts 1..k all stand. Every position is known for every block: after a rejection it is 0.
    """
    temperatures = np.ones(logits.shape[1])
    before = np.ones(len(logits))
    for position in range(logits.shape[1]):
        errors = [expected_error(before * sigmoid(logits[:, position] / t), stood[:, position]) for t in _CANDIDATES]
        temperatures[position] = _CANDIDATES[int(np.argmin(errors))]
        before = before * sigmoid(logits[:, position] / temperatures[position])
    return temperatures


def quality(logits: Floats, stood: Floats, temperatures: Floats | None = None) -> Quality:
    """Of these blocks; temperatures [K], one each where None."""
    scaled = logits if temperatures is None else logits / temperatures
    predicted: Floats = np.asarray(np.cumprod(sigmoid(scaled), axis=1), np.float64)
    columns = range(logits.shape[1])
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


def reliability(logits: Floats, stood: Floats, temperatures: Floats | None = None) -> list[tuple[Floats, Floats]]:
    """By position: (mean predicted chance, share that stood), float64 [bins] each, of bins of equal mass."""
    predicted = np.cumprod(sigmoid(logits if temperatures is None else logits / temperatures), axis=1)
    found = []
    for position in range(logits.shape[1]):
        parts = [part for part in np.array_split(np.argsort(predicted[:, position], kind="stable"), min(BINS, len(logits))) if len(part)]
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
