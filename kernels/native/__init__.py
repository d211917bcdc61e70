"""Kernels compiled for the processor at hand, through llvmlite: the CPU path in float32.

Everything else on a CPU (other types, processors without AVX2, no llvmlite) runs the plain-torch reference.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


@cache
def available() -> bool:
    """Whether kernels can be compiled and run here."""
    if find_spec("llvmlite") is None:
        return False
    from kernels.native.jit import lanes, openmp

    return lanes() > 0 and openmp() is not None


def takes_weight(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights can be packed for `kernels.native.linear`."""
    return device.type == "cpu" and dtype == torch.float32 and available()


def takes_rows(x: torch.Tensor) -> bool:
    """Whether rows [T, N] of `x` can be looked through by `kernels.native.rows`."""
    return x.dtype == torch.float32 and x.dim() == 2 and x.stride(1) == 1 and 0 < x.shape[1] < 1 << 31


def takes_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x [..., N] can be normalised by `kernels.native.rows`."""
    from kernels.native.jit import lanes

    return x.dtype == weight.dtype == torch.float32 and x.dim() > 1 and x.stride(-1) == 1 and x.shape[-1] % lanes() == 0


def takes_gated(gate: torch.Tensor, dtype: torch.dtype, activation: str) -> bool:
    """Whether a gate [N, K], and the like of it for up, can be packed in `dtype` for `gated_product`."""
    if not takes_weight(dtype, gate.device):
        return False
    from kernels.native import linear
    from kernels.native.jit import lanes

    return activation in linear.ACTIVATIONS and len(gate) % lanes() == 0


def takes_cache(dtype: torch.dtype, device: torch.device, head_dim: int, block_size: int) -> bool:
    """Whether attention over a KV cache of this kind runs here; its keys are then to be stored transposed."""
    if dtype != torch.float32 or device.type != "cpu" or not available():
        return False
    from kernels.native.attention_plan import CHUNK, KEYS, MOST_HEAD_DIM

    return head_dim % KEYS == 0 and head_dim <= MOST_HEAD_DIM and block_size % KEYS == 0 and CHUNK % block_size == 0


def takes_rotation(cos: torch.Tensor | None) -> bool:
    """Whether the kernel turns as many dimensions of a head as `cos` [T, R] has: whole vectors in either half."""
    from kernels.native.jit import lanes

    return cos is None or cos.shape[-1] % (2 * lanes()) == 0
