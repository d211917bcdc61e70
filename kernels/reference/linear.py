"""Matrix products with weights laid out once, at load; on request as eight-bit integers with a scale for each output.

In float32 on a CPU the products are compiled kernels (`kernels.native.linear`). Where those cannot run, and in bfloat16, oneDNN's blocked
weight layout is worth the second copy: all products of a 135M-parameter Llama took 102 ms at 64 rows against 198 ms through torch's plain
linear (2 cores, AVX-512, float32), and 23 against 64 ms at 4 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from kernels import native, pages

Layout = Literal["rows", "onednn", "panels", "gated panels"]

_AT_ONCE = 1 << 20
"""Numbers of a weight that are worked on at a time: a vocabulary's head has some 28 million, each in between four bytes wide."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight [out_features, in_features] in the layout its device multiplies fastest, and its bias [out_features].

    `gated panels`: gate and up interleaved, for `gated_linear` alone. A weight of int8 is to be multiplied with its `scales` (one an
    output, in the order of the layout); inputs, sums and results stay in their own type.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    out_features: int
    layout: Layout
    scales: torch.Tensor | None = None


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] -> int8 [out, in] and scales [out] of the weight's type: the nearest of 255 steps to the largest number of its row."""
    weight = weight.detach()
    on_cpu = weight.device.type == "cpu"
    # Pages of their own go back to the system where the numbers are packed further: the allocator keeps what it is given back.
    numbers = pages.zeros(weight.shape, torch.int8) if on_cpu else torch.empty_like(weight, dtype=torch.int8)
    scales = weight.new_empty(len(weight))
    size = max(_AT_ONCE // max(weight.shape[1], 1), 1)
    for rows, packed, scale in zip(weight.split(size), numbers.split(size), scales.split(size), strict=True):
        torch.div(rows.abs().amax(dim=1).clamp(min=torch.finfo(weight.dtype).tiny), 127, out=scale)
        packed.copy_((rows / scale[:, None]).round_().clamp_(-127, 127))
    return numbers, scales


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None = None, *, int8: bool = False) -> PackedLinear:
    """Packs `weight` [out, in]; the result owns its memory, so the argument may be freed."""
    if int8:
        numbers, scales = quantise(weight)
        if native.takes_weight(weight):
            from kernels.native import linear as compiled

            packed_bias = None if bias is None else compiled.pad_outputs(bias)
            return PackedLinear(compiled.pack(numbers), packed_bias, weight.shape[0], "panels", compiled.pad_outputs(scales))
        return PackedLinear(numbers, bias, weight.shape[0], "rows", scales)
    if native.takes_weight(weight):
        from kernels.native import linear as compiled

        return PackedLinear(compiled.pack(weight), None if bias is None else compiled.pad_outputs(bias), weight.shape[0], "panels")
    if _can_block(weight):
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        return PackedLinear(blocked, bias, weight.shape[0], "onednn")
    return PackedLinear(weight.contiguous(), bias, weight.shape[0], "rows")


def pack_gated_linear(weight: torch.Tensor, activation: str, *, int8: bool = False) -> PackedLinear:
    """Packs a fused gate (above) and up (below) weight [2 * out, in] for `gated_linear` with this activation."""
    if native.takes_gated(weight, activation):
        from kernels.native import linear as compiled

        if int8:
            numbers, scales = quantise(weight)
            return PackedLinear(compiled.pack_gated(numbers), None, len(weight), "gated panels", compiled.pair_gated(scales).flatten())
        return PackedLinear(compiled.pack_gated(weight), None, weight.shape[0], "gated panels")
    return pack_linear(weight, int8=int8)


def linear(x: torch.Tensor, packed: PackedLinear, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in] @ weight.T (+ bias) (+ residual [T, out]), as one product with the additions fused into it."""
    if packed.layout == "rows":
        if packed.scales is None:
            y = functional.linear(x, packed.weight, packed.bias)
        else:
            y = functional.linear(x, packed.weight.to(x.dtype)) * packed.scales
            y = y if packed.bias is None else y.add_(packed.bias)
        return y if residual is None else y.add_(residual)
    if x.shape[0] == 0:
        return x.new_empty(0, packed.out_features)
    if packed.layout == "panels":
        from kernels.native import linear as compiled

        return compiled.product(x, packed.weight, packed.out_features, packed.bias, residual, packed.scales)
    if residual is None:
        return torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed.weight, packed.bias, "add")


def _can_block(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
