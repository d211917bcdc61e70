"""SwiGLU and GeGLU on the device: gate and up read once, the product written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


@triton.jit
def _gated(gate_up, out, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < width
    start = gate_up + row * 2 * width
    gate = tl.load(start + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + width + offsets, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == 0:
        gate = gate * tl.sigmoid(gate)
    elif ACTIVATION == 1:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == 2:
        # tanh(z) = 2 sigmoid(2z) - 1, so 0.5 (1 + tanh(z)) = sigmoid(2z).
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        gate = tl.maximum(gate, 0.0)
    tl.store(out + row * width + offsets, (gate * up).to(out.dtype.element_ty), mask=inside)


def gated_activation(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """As `kernels.reference.gated_activation`. Raises KeyError for an unknown activation, ValueError for an odd width."""
    code = _CODES[activation]
    rows, both = gate_up.shape
    if both % 2:
        raise ValueError(f"a fused gate/up row has an even number of columns, got {both}")
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(rows, both // 2)
    if out.numel():
        _gated[(rows, triton.cdiv(both // 2, BLOCK))](gate_up, out, both // 2, ACTIVATION=code, BLOCK=BLOCK)
    return out
