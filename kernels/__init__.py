"""Public ops: Triton on CUDA where an op has a Triton version, otherwise the plain-torch reference, which is also the CPU path.

Importing this package does nothing else: it shares its import name with an optional Hugging Face package that transformers
looks for. transformers takes only versions in [0.18.2, 0.19) of that package, so `__version__` (and the
version of the distribution) must stay outside that range. See `kernels.clash`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from kernels.reference.attention_plan import AttentionPlan
    from kernels.reference.linear import PackedLinear
    from kernels.reference.sequential_head import DraftBlock, SequentialHead

__version__ = "1.0.0"

__all__ = ["attention", "gated_activation", "kv_write", "linear", "pack_linear", "plan_attention", "rms_norm", "rotary", "sequential_head"]

TRITON_OPS: dict[str, str] = {"gated_activation": "gated_activation", "rms_norm": "rms_norm"}
"""Op name -> module under `kernels.triton`. An op that is not listed runs its reference on every device."""

_REFERENCE_OPS = {
    "attention": "attention",
    "gated_activation": "gated_activation",
    "kv_write": "kv_write",
    "linear": "linear",
    "pack_linear": "linear",
    "plan_attention": "attention_plan",
    "rms_norm": "rms_norm",
    "rotary": "rotary",
    "sequential_head": "sequential_head",
}


@cache
def _implementation(op: str, device_type: str) -> Callable[..., Any]:
    if device_type == "cuda" and op in TRITON_OPS:
        return getattr(import_module(f"kernels.triton.{TRITON_OPS[op]}"), op)
    return getattr(import_module(f"kernels.reference.{_REFERENCE_OPS[op]}"), op)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension. See `kernels.reference.rms_norm`."""
    return _implementation("rms_norm", x.device.type)(x, weight, eps)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [T, heads, head_dim]. See `kernels.reference.rotary`."""
    return _implementation("rotary", x.device.type)(x, cos, sin)


def gated_activation(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up of a fused [T, 2 * I] row. See `kernels.reference.gated_activation`."""
    return _implementation("gated_activation", gate_up.device.type)(gate_up, activation)


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
    """Lays a weight [out, in] out for this device. See `kernels.reference.linear`."""
    return _implementation("pack_linear", weight.device.type)(weight, bias)


def linear(x: torch.Tensor, packed: PackedLinear, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T (+ bias) (+ residual). See `kernels.reference.linear`."""
    return _implementation("linear", x.device.type)(x, packed, residual)


def kv_write(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan) -> None:
    """Writes keys and values [T, kv_heads, head_dim] into their paged caches. See `kernels.reference.kv_write`."""
    _implementation("kv_write", k.device.type)(k, v, k_cache, v_cache, plan)


def plan_attention(
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    kv_lengths: torch.Tensor,
    slots: torch.Tensor,
    *,
    cache: torch.Tensor,
    num_heads: int,
    window: int | None = None,
) -> AttentionPlan:
    """What attention needs to know of a step, worked out once for all layers. See `kernels.reference.attention_plan`."""
    return _implementation("plan_attention", cache.device.type)(
        block_tables, query_start, kv_lengths, slots, cache=cache, num_heads=num_heads, window=window
    )


def attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, scale: float, soft_cap: float | None = None
) -> torch.Tensor:
    """Paged, causal, variable-length attention of [T, heads, head_dim] queries. See `kernels.reference.attention`."""
    return _implementation("attention", q.device.type)(q, k_cache, v_cache, plan, scale, soft_cap)


def sequential_head(
    logits: torch.Tensor,
    hidden: torch.Tensor | None,
    anchors: torch.Tensor,
    head: SequentialHead,
    *,
    temperatures: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
    keep_weights: bool = False,
) -> DraftBlock:
    """Drafts the tokens of a block one after the other. See `kernels.reference.sequential_head`."""
    return _implementation("sequential_head", logits.device.type)(
        logits, hidden, anchors, head, temperatures=temperatures, keys=keys, keep_weights=keep_weights
    )
