"""Counter-based random numbers: every number is a pure function of (seed, sample, position, stream, attempt) and, for noise
over the vocabulary, of the token. Nothing depends on the order of calls or on who shares a batch.

The mixers are the finalisers of SplitMix64 (Steele, Lea, Flood 2014) on the host and of MurmurHash3 (Appleby) per token.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GOLDEN = -1640531527  # 0x9E3779B9 as int32
_MURMUR_1 = -2048144789  # 0x85EBCA6B
_MURMUR_2 = -1028477387  # 0xC2B2AE35


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


def keys(
    seeds: NDArray[np.uint64], positions: NDArray[np.int64], stream: Stream, *, sample: int = 0, attempt: int = 0
) -> NDArray[np.uint64]:
    """uint64 [R]: one key a row. `positions` count generated tokens; `attempt` tells repeated draws at a position apart."""
    counter = np.uint64(((attempt & 0xFFFFFFFFFFFF) << 16 | (sample & 0xFFF) << 4 | stream) & 0xFFFFFFFFFFFFFFFF)
    return mix(mix(mix(seeds) + positions.astype(np.uint64)) ^ counter)


def uniform(row_keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    """float64 [R], uniform in the open interval (0, 1), 53 bits."""
    return ((mix(row_keys) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def exponential(row_keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """float32 [R, K] standard exponential noise, one number for each (row key, token).

    row_keys: int64 [R]. token_ids: int64 [R, K], or [K] for the same tokens in every row. `-log` of it is Gumbel noise, so
    the argmin of `exponential / p` is the argmax of `log p + Gumbel`, a sample of p. 31 random bits: tokens down to a
    probability of about 1e-9 keep their share.
    """
    first = (row_keys & 0xFFFFFFFF).to(torch.int64)
    low = torch.where(first >= 1 << 31, first - (1 << 32), first).to(torch.int32)[:, None]
    high = (row_keys >> 32).to(torch.int32)[:, None]
    x = (token_ids.to(torch.int32) * _GOLDEN) ^ low
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_MURMUR_1)
    x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF)).bitwise_xor_(high).mul_(_MURMUR_2)
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).bitwise_and_(0x7FFFFFFF)
    # The clamp keeps -log1p finite where float32 rounds the largest values up to 1.
    uniforms = x.to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    return uniforms.neg_().log1p_().neg_()
