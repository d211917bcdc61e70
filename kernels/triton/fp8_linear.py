"""Products with e4m3 weights on the device: weights are read in eight bits and widened in registers, activations stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.reference.fp8_linear import FP8_STEP
from kernels.triton import tuning
from kernels.triton.fp8 import widen
from kernels.triton.target import converts_fp8, needs_wide_dot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kernels.reference.fp8_linear import Fp8Linear

_BLOCK_K = FP8_STEP


@triton.jit(do_not_specialize=["rows"])
def _product(
    x, weight, scale, bias, residual, out, rows, columns, depth, stride_x, stride_w, stride_s, stride_r, block_rows, block_depth,
    BIASED: tl.constexpr, ADDS: tl.constexpr, NATIVE: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_m, real_n = m < rows, n < columns
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        real_k = k < depth
        a = tl.load(x + m.to(tl.int64)[:, None] * stride_x + k[None, :], mask=real_m[:, None] & real_k[None, :], other=0.0)
        w = tl.load(weight + n.to(tl.int64)[None, :] * stride_w + k[:, None], mask=real_n[None, :] & real_k[:, None], other=0)
        b = widen(w, NATIVE).to(a.dtype)
        if WIDE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        # A step of k lies in one block of the scales, so the scale is applied to the step's sum.
        factor = tl.load(scale + n // block_rows * stride_s + start // block_depth, mask=real_n, other=0.0)
        acc += tl.dot(a, b, input_precision="ieee") * factor[None, :]
    if BIASED:
        acc += tl.load(bias + n, mask=real_n, other=0.0).to(tl.float32)[None, :]
    real = real_m[:, None] & real_n[None, :]
    if ADDS:
        acc += tl.load(residual + m.to(tl.int64)[:, None] * stride_r + n[None, :], mask=real, other=0.0).to(tl.float32)
    tl.store(out + m.to(tl.int64)[:, None] * columns + n[None, :], acc.to(out.dtype.element_ty), mask=real)


def fp8_linear(x: torch.Tensor, packed: Fp8Linear, residual: torch.Tensor | None = None) -> torch.Tensor:
    """As `kernels.reference.fp8_linear`, with float32 sums. Raises ValueError for blocks that 128 does not fit into, or other shapes."""
    rows, depth = x.shape
    columns = packed.out_features
    if depth != packed.weight.shape[1] or x.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)} with strides {x.stride()} does not fit a weight {tuple(packed.weight.shape)}")
    if packed.block[1] < depth and packed.block[1] % _BLOCK_K:
        raise ValueError(f"blocks of scales must span a multiple of {_BLOCK_K} inputs or all of them, got {packed.block}")
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    weight = packed.weight.view(torch.uint8)

    def launch(config: tuning.Config) -> None:
        _product[(triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(columns, config["BLOCK_N"]))](
            x, weight, packed.scale, x if packed.bias is None else packed.bias, x if residual is None else residual, out,
            rows, columns, depth, x.stride(0), weight.stride(0), packed.scale.stride(0), 0 if residual is None else residual.stride(0),
            packed.block[0], packed.block[1], BIASED=packed.bias is not None, ADDS=residual is not None, NATIVE=converts_fp8(x.device),
            WIDE=needs_wide_dot(x.dtype), BLOCK_M=config["BLOCK_M"], BLOCK_N=config["BLOCK_N"], BLOCK_K=_BLOCK_K,
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip

    tier = triton.next_power_of_2(min(rows, 512))
    tuning.run("fp8_linear", f"{tier}/{columns}/{depth}/{str(x.dtype)[6:]}", x.device, list(_configs(tier)), launch)
    return out


def _configs(tier: int) -> Iterator[tuning.Config]:
    """Few rows are bound by the weights' bytes and want many programs; many rows by arithmetic and want large tiles."""
    if tier <= 32:
        block_m = max(tier, 16)
        for block_n, warps, stages in ((32, 4, 4), (64, 4, 4), (32, 4, 5), (64, 8, 3), (128, 8, 3)):
            yield {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
        return
    for block_m, block_n, warps, stages in ((64, 128, 4, 3), (128, 128, 8, 3), (64, 64, 4, 4), (128, 64, 4, 3)):
        yield {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
