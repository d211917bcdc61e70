"""The line that something takes: so much in any case, and so much for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def fit_line(counts: Floats, values: Floats, weights: Floats | None = None) -> tuple[float, float]:
    """(fixed, each), neither negative, by least squares; their sum over what was seen is right. All float64 [N], N at least 1.

    From one count alone nothing is told apart: all of it is for each.
    """
    mean_count, mean = np.average(counts, weights=weights), np.average(values, weights=weights)
    spread = np.average((counts - mean_count) ** 2, weights=weights)
    if not spread:
        return 0.0, float(mean / mean_count)
    slope = np.average((counts - mean_count) * (values - mean), weights=weights) / spread
    each = float(np.clip(slope, 0.0, mean / mean_count))
    return float(mean - each * mean_count), each
