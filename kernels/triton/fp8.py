"""e4m3 numbers to and from half precision with integer instructions, for devices that cannot convert them (before sm_89).

Moved up by seven bits, exponent and mantissa of e4m3 are those of a half whose value is 2^-8 of the number, subnormals included.
"""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_MAX = 448.0
MAX: tl.constexpr = tl.constexpr(E4M3_MAX)


@triton.jit
def widen(x, NATIVE: tl.constexpr):
    """The bits of e4m3 numbers in uint8 -> float16, exactly."""
    if NATIVE:
        return x.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    bits = x.to(tl.int16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def narrow(x, NATIVE: tl.constexpr):
    """float32 -> the bits of e4m3 numbers in uint8; to nearest, ties to even, saturating."""
    x = tl.minimum(tl.maximum(x, -MAX), MAX)
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = (x * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    magnitude = bits & 0x7FFF
    magnitude = (magnitude + 0x3F + ((magnitude >> 7) & 1)) >> 7
    return (((bits >> 8) & 0x80) | magnitude).to(tl.uint8)
