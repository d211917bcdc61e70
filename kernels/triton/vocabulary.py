"""Parts of the kernels that walk a row of logits: logits as rules leave them, numbers that sort like floats, seeded noise."""

from __future__ import annotations

import triton
import triton.language as tl

LEAST_KEY: tl.constexpr = tl.constexpr(-2147483648)
"""Below the key of every number."""
INFINITE_KEY: tl.constexpr = tl.constexpr(-2139095041)
"""The key of minus infinity."""


@triton.jit
def sort_key(x):
    """float32 -> int32 in the same order."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes +0, which it equals
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def of_key(key):
    """The float32 of a `sort_key` in int64."""
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def processed(
    row_at, ids, inside, row, bias_row, count_row, mask_row, depth, biases, counts, prompt, allowed, drafts, stride_biases, stride_counts,
    stride_bits, presence, frequency, repetition, BIASES: tl.constexpr, PENALTIES: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """float32 logits of `ids` after biases, penalties and the allowed-token mask, not yet tempered; -inf outside.

    Drafts of the same block that stand before the row count as generated: `drafts[row - depth : row]`.
    """
    x = tl.load(row_at + ids, mask=inside, other=float("-inf")).to(tl.float32)
    if BIASES:
        if bias_row >= 0:
            x += tl.load(biases + bias_row * stride_biases + ids, mask=inside, other=0.0)
    if PENALTIES:
        if count_row >= 0:
            made = tl.load(counts + count_row * stride_counts + ids, mask=inside, other=0).to(tl.int32)
            for back in range(1, depth + 1):
                made += (ids == tl.load(drafts + row - back)).to(tl.int32)
            given = tl.load(prompt + count_row * stride_bits + ids // 32, mask=inside, other=0)
            seen = (made > 0) | (((given >> (ids % 32)) & 1) == 1)
            x = tl.where(seen, tl.where(x > 0.0, x / repetition, x * repetition), x)
            x = x - made.to(tl.float32) * frequency - tl.where(made > 0, presence, 0.0)
            x = tl.where(inside, x, float("-inf"))
    if MASK:
        if mask_row >= 0:
            word = tl.load(allowed + mask_row * stride_bits + ids // 32, mask=inside, other=0)
            x = tl.where(((word >> (ids % 32)) & 1) == 1, x, float("-inf"))
    return x


@triton.jit
def mix(value):
    """SplitMix64's step and finaliser of a uint64."""
    z = value + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def row_key(seed, position, attempt, STREAM: tl.constexpr):
    """`kernels.reference.noise.row_keys` of one row; all arguments int64, the result uint64."""
    counter = ((attempt & 0xFFFFFFFFFFFF) << 16) | STREAM
    return mix(mix(mix(seed.to(tl.uint64, bitcast=True)) + position.to(tl.uint64, bitcast=True)) ^ counter.to(tl.uint64, bitcast=True))


@triton.jit
def uniform(key):
    """float64 in (0, 1) with 53 bits, of a uint64 key."""
    return ((mix(key) >> 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16


@triton.jit
def exponential(key, ids):
    """`kernels.reference.noise.exponential`: float32 noise of each token id under one uint64 key."""
    low = (key & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = (key >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
    x = (ids * -1640531527) ^ low
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789
    x = (x ^ ((x >> 13) & 0x7FFFF) ^ high) * -1028477387
    x = (x ^ ((x >> 16) & 0xFFFF)) & 0x7FFFFFFF
    u = tl.minimum((x.to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.99999994)
    # log1p(-u) exact where 1 - u rounds (Kahan): without it every u below 2^-25 would give zero, the certain winner.
    rest = 1.0 - u
    near = rest == 1.0
    return tl.where(near, u, -tl.log(rest) * (u / tl.where(near, 1.0, 1.0 - rest)))
