"""Counter-based random numbers: every number is a pure function of (seed, sample, position, stream, attempt) and, for noise
over the vocabulary, of the token. Nothing depends on the order of calls or on who shares a batch.

Keys are made on the host, with the finaliser of SplitMix64 (Steele, Lea, Flood 2014); noise per token is `kernels.reference.noise`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from kernels.reference.noise import exponential

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Stream", "exponential", "keys", "mix", "sample_seed", "uniform"]

_MASK = (1 << 64) - 1


class Stream(IntEnum):
    """Separate uses of randomness at one position; sharing one would correlate a draft with its own acceptance."""

    TOKEN = 0
    ACCEPT = 1
    RESAMPLE = 2
    DRAFT = 3


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's step and finaliser, elementwise."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), np.uint64)


def sample_seed(seed: int, sample: int) -> int:
    """The 64-bit seed of one of several answers under one seed: the seed itself for the first."""
    if sample == 0:
        return seed & _MASK
    return int(mix(mix(np.array([seed & _MASK], np.uint64)) + np.uint64(sample))[0])


def keys(seeds: NDArray[np.uint64], positions: NDArray[np.int64], stream: Stream, *, attempt: int = 0) -> NDArray[np.uint64]:
    """uint64 [R]: one key a row. `positions` count generated tokens; `attempt` tells repeated draws at a position apart."""
    counter = np.uint64(((attempt & 0xFFFFFFFFFFFF) << 16 | stream) & _MASK)
    return mix(mix(mix(seeds) + positions.astype(np.uint64)) ^ counter)


def uniform(row_keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    """float64 [R], uniform in the open interval (0, 1), 53 bits."""
    return ((mix(row_keys) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
