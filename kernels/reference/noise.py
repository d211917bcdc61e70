"""Counter-based noise on tensors: the same numbers on every device, whatever the order of calls or the company in a batch.

The mixers are the finalisers of SplitMix64 (Steele, Lea, Flood 2014) for a row's key and of MurmurHash3 (Appleby) per token.
`engine.noise` makes the same keys on the host.
"""

from __future__ import annotations

import torch

_GOLDEN = -1640531527  # 0x9E3779B9 as int32
_MURMUR_1 = -2048144789  # 0x85EBCA6B
_MURMUR_2 = -1028477387  # 0xC2B2AE35
_WEYL = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_SPLIT_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SPLIT_2 = -7723592293110705685  # 0x94D049BB133111EB


def mix(values: torch.Tensor) -> torch.Tensor:
    """SplitMix64's step and finaliser of int64 bit patterns, elementwise."""
    z = values + _WEYL
    z = (z ^ _shift_right(z, 30)) * _SPLIT_1
    z = (z ^ _shift_right(z, 27)) * _SPLIT_2
    return z ^ _shift_right(z, 31)


def row_keys(seeds: torch.Tensor, positions: torch.Tensor, stream: torch.Tensor | int, attempt: torch.Tensor | int) -> torch.Tensor:
    """int64 [R]: `engine.noise.keys` of sample 0 (`stream` and `attempt` as there), for seeds and positions that are on the device."""
    counter = ((attempt & 0xFFFFFFFFFFFF) << 16) | stream
    return mix(mix(mix(seeds) + positions) ^ counter)


def uniform(keys: torch.Tensor) -> torch.Tensor:
    """float64 [R], uniform in the open interval (0, 1), 53 bits."""
    return (_shift_right(mix(keys), 11).to(torch.float64) + 0.5) * 2.0**-53


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


def _shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift, which torch's is not for signed numbers."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
