"""Ratios of interleaved runs with intervals that assume nothing but symmetry of luck: order statistics of the paired ratios. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from statistics import median
from typing import Any

_WANTED = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """Of a median ratio. `confidence`: the chance that an interval made so covers the true median (of n pairs, 1 - 2^(1-n) at most)."""

    median: float
    low: float
    high: float
    confidence: float

    def row(self) -> dict[str, Any]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Of paired runs: the i-th of both ran side by side."""
    return median_interval([a / b for a, b in zip(ours, theirs, strict=True)])


def median_interval(values: Sequence[float]) -> Interval:
    """The narrowest pair of order statistics that covers the median with 95%, or the widest there is where the values are too few."""
    ordered, count = sorted(values), len(values)
    if not count:
        raise ValueError("an interval of no values")
    best = 0
    for place in range((count + 1) // 2):
        if _coverage(count, place) >= _WANTED:
            best = place
    return Interval(median(ordered), ordered[best], ordered[count - 1 - best], _coverage(count, best))


def _coverage(count: int, place: int) -> float:
    """Chance that the median lies between the order statistics `place` and `count - 1 - place` (from 0)."""
    return 1.0 - 2.0 * sum(comb(count, index) for index in range(place + 1)) / 2.0**count
