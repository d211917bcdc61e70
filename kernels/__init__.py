"""Public ops: Triton on CUDA where an op has a Triton version, compiled kernels (`kernels.native`) for float32 on a CPU, otherwise the
plain-torch reference.

Importing this package does nothing else: it shares its import name with an optional Hugging Face package that transformers
looks for. transformers takes only versions in [0.18.2, 0.19) of that package, so `__version__` (and the
version of the distribution) must stay outside that range. See `kernels.clash`.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from types import ModuleType

    import torch

    from kernels.native.attention_plan import NativePlan
    from kernels.reference.attention_plan import AttentionPlan
    from kernels.reference.fp8_linear import Fp8Linear
    from kernels.reference.linear import PackedLinear
    from kernels.reference.sampling import Allowed, Biases, DraftWeights, Penalties, SampleRows, Tally, Verdict
    from kernels.reference.sequential_head import DraftBlock, SequentialHead

__version__ = "1.0.0"

__all__ = [
    "accept_drafts",
    "add_rms_norm",
    "allocate_top",
    "attention",
    "fp8_linear",
    "gated_activation",
    "kv_write",
    "linear",
    "pack_gated_linear",
    "pack_linear",
    "paged_attention",
    "peaks",
    "plan_attention",
    "rms_norm",
    "rotary",
    "rotary_kv_write",
    "sequential_head",
    "token_log_probs",
    "verify",
]

TRITON_OPS: dict[str, str] = {
    "accept_drafts": "sampling",
    "add_rms_norm": "rms_norm",
    "allocate_top": "draft_budget",
    "attention": "attention",
    "fp8_linear": "fp8_linear",
    "gated_activation": "gated_activation",
    "kv_write": "kv_write",
    "paged_attention": "attention",
    "plan_attention": "attention_plan",
    "rms_norm": "rms_norm",
    "rotary_kv_write": "kv_write",
    "sequential_head": "sequential_head",
    "token_log_probs": "sampling",
    "verify": "sampling",
}
"""Op name -> module under `kernels.triton`. An op that is not listed runs its reference on every device."""

_REFERENCE_OPS = {
    "accept_drafts": "sampling",
    "add_rms_norm": "add_rms_norm",
    "allocate_top": "draft_budget",
    "attention": "attention",
    "fp8_linear": "fp8_linear",
    "gated_activation": "gated_activation",
    "kv_write": "kv_write",
    "linear": "linear",
    "pack_gated_linear": "linear",
    "pack_linear": "linear",
    "paged_attention": "paged_attention",
    "peaks": "peaks",
    "plan_attention": "attention_plan",
    "rms_norm": "rms_norm",
    "rotary": "rotary",
    "rotary_kv_write": "rotary_kv_write",
    "sequential_head": "sequential_head",
    "token_log_probs": "sampling",
    "verify": "sampling",
}


@cache
def _implementation(op: str, device_type: str) -> Callable[..., Any]:
    if device_type == "cuda" and op in TRITON_OPS:
        return getattr(import_module(f"kernels.triton.{TRITON_OPS[op]}"), op)
    return getattr(import_module(f"kernels.reference.{_REFERENCE_OPS[op]}"), op)


@contextmanager
def tuned(folder: Path, device: torch.device) -> Iterator[None]:
    """On a GPU: takes up the launch configurations found before, and within it measures those of new shapes and keeps them in `folder`."""
    if device.type != "cuda":
        yield
        return
    tuning = import_module("kernels.triton.tuning")
    tuning.load(folder, device)
    with tuning.tuning(folder):
        yield


def keep_compiled(folder: Path) -> None:
    """Kernels that are compiled for this CPU from now on are kept in `folder`, and read from there where they lie already."""
    if _native() is not None:
        import_module("kernels.native.jit").keep_in(folder)


@cache
def _native() -> ModuleType | None:
    """`kernels.native` where it can run."""
    module = import_module("kernels.native")
    return module if module.available() else None


@cache
def _compiled(module: str, op: str) -> Callable[..., Any]:
    return getattr(import_module(f"kernels.native.{module}"), op)


def stores_keys_transposed(dtype: torch.dtype, device: torch.device, head_dim: int, block_size: int) -> bool:
    """Whether a KV cache's keys are to lie as [num_blocks, kv_heads, head_dim, block_size] in memory (and be seen transposed back, like
    values, [num_blocks, kv_heads, block_size, head_dim]): what the compiled attention reads. The ops tell by the strides.
    """
    native = _native() if device.type == "cpu" else None
    return native is not None and native.takes_cache(dtype, device, head_dim, block_size)


def _transposed(keys: torch.Tensor) -> bool:
    return keys.device.type == "cpu" and keys.stride(-1) != 1 and keys.shape[-1] > 1


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension. See `kernels.reference.rms_norm`."""
    if x.device.type == "cpu" and (native := _native()) is not None and native.takes_norm(x, weight):
        return _compiled("rows", "rms_norm")(x, weight, eps)
    return _implementation("rms_norm", x.device.type)(x, weight, eps)


def peaks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest number of each row [T, N], and its first place. See `kernels.reference.peaks`."""
    if x.device.type == "cpu" and (native := _native()) is not None and native.takes_rows(x):
        return _compiled("rows", "peaks")(x)
    return _implementation("peaks", x.device.type)(x)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [T, heads, head_dim]. See `kernels.reference.rotary`."""
    return _implementation("rotary", x.device.type)(x, cos, sin)


def gated_activation(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up of a fused [T, 2 * I] row. See `kernels.reference.gated_activation`."""
    return _implementation("gated_activation", gate_up.device.type)(gate_up, activation)


def pack_linear(
    weight: torch.Tensor | Sequence[torch.Tensor],
    bias: torch.Tensor | None = None,
    *,
    int8: bool = False,
    dtype: torch.dtype | None = None,
    screened: bool = False,
) -> PackedLinear:
    """Lays a weight [out, in], or several stacked, out for their device, on request in eight bits, or for `linear_peaks`. See
    `kernels.reference.linear`.
    """
    return _implementation("pack_linear", weight[0].device.type)(weight, bias, int8=int8, dtype=dtype, screened=screened)


def pack_gated_linear(
    weight: torch.Tensor | Sequence[torch.Tensor], activation: str, *, int8: bool = False, dtype: torch.dtype | None = None
) -> PackedLinear:
    """Lays a weight [2 * out, in], gate above up, or the two of them out for `gated_linear`. See `kernels.reference.linear`."""
    return _implementation("pack_gated_linear", weight[0].device.type)(weight, activation, int8=int8, dtype=dtype)


def linear(x: torch.Tensor, packed: PackedLinear | Fp8Linear, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T (+ bias) (+ residual). See `kernels.reference.linear` and, for FP8 weights, `kernels.reference.fp8_linear`."""
    if hasattr(packed, "scale"):
        return fp8_linear(x, cast("Fp8Linear", packed), residual)
    return _implementation("linear", x.device.type)(x, packed, residual)


def linear_peaks(x: torch.Tensor, packed: PackedLinear | Fp8Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """`peaks` of `linear(x, packed)` in float32, to the last bit; without computing all of it where `packed` is screened."""
    if len(x) and (screen := getattr(packed, "screen", None)) is not None:
        panels = cast("PackedLinear", packed)
        return _compiled("screen", "peaks")(x, panels.weight, panels.out_features, screen)
    return peaks(linear(x, packed).float())


def rough_linear(x: torch.Tensor, packed: PackedLinear | Fp8Linear) -> torch.Tensor:
    """About `linear(x, packed)` in float32: with weights of eight bits, a quarter of the bytes, where `packed` is screened."""
    if len(x) and (screen := getattr(packed, "screen", None)) is not None:
        return _compiled("screen", "rough_product")(x, screen, cast("PackedLinear", packed).out_features)
    return linear(x, packed).float()


def gated_linear(x: torch.Tensor, packed: PackedLinear | Fp8Linear, activation: str) -> torch.Tensor:
    """activation(x @ gate.T) * (x @ up.T) -> [T, out], of a weight from `pack_gated_linear` (for the same activation) or `pack_linear`."""
    if getattr(packed, "layout", "") == "gated panels":
        panels = cast("PackedLinear", packed)
        return _compiled("linear", "gated_product")(x, panels.weight, activation, panels.scales)
    return gated_activation(linear(x, packed), activation)


def kv_write(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan | NativePlan) -> None:
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
    causal: bool = True,
) -> AttentionPlan | NativePlan:
    """What attention needs to know of a step, worked out once for all layers. See `kernels.reference.attention_plan`."""
    if causal and _transposed(cache):
        plan = _compiled("attention_plan", "plan_attention")
        return plan(block_tables, query_start, kv_lengths, slots, cache=cache, num_heads=num_heads, window=window)
    plan = _implementation("plan_attention", cache.device.type)
    return plan(block_tables, query_start, kv_lengths, slots, cache=cache, num_heads=num_heads, window=window, causal=causal)


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan | NativePlan,
    scale: float,
    soft_cap: float | None = None,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Paged, causal, variable-length attention over a plan of `plan_attention`. See `kernels.reference.attention`.

    k_scale, v_scale: float32 [kv_heads], of fp8 caches.
    """
    if _transposed(k_cache):
        return _compiled("attention", "attention")(q, k_cache, v_cache, plan, scale, soft_cap)
    attend = _implementation("attention", q.device.type)
    return attend(q, k_cache, v_cache, plan, scale, soft_cap, k_scale=k_scale, v_scale=v_scale)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    kv_lengths: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    causal: bool = True,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one layer from the plain tensors of a step. See `kernels.reference.paged_attention`."""
    return _implementation("paged_attention", q.device.type)(
        q, k_cache, v_cache, block_tables, query_start, kv_lengths, scale,
        window=window, soft_cap=soft_cap, causal=causal, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and the sum. See `kernels.reference.add_rms_norm`."""
    return _implementation("add_rms_norm", x.device.type)(x, residual, weight, eps)


def rotary_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalises and rotates queries and keys, writes keys and values, returns queries. See `kernels.reference.rotary_kv_write`."""
    if _transposed(k_cache) and import_module("kernels.native").takes_rotation(cos):
        return _compiled("rows", "rotary_kv_write")(
            qkv, cos, sin, slots, k_cache, v_cache, num_heads=num_heads, q_norm=q_norm, k_norm=k_norm, eps=eps
        )
    return _implementation("rotary_kv_write", qkv.device.type)(
        qkv, cos, sin, slots, k_cache, v_cache,
        num_heads=num_heads, q_norm=q_norm, k_norm=k_norm, eps=eps, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def fp8_linear(x: torch.Tensor, packed: Fp8Linear, residual: torch.Tensor | None = None) -> torch.Tensor:
    """A product with weights stored as e4m3. See `kernels.reference.fp8_linear`."""
    return _implementation("fp8_linear", x.device.type)(x, packed, residual)


def verify(
    logits: torch.Tensor,
    rows: SampleRows,
    attempt: torch.Tensor,
    *,
    draft: DraftWeights | None = None,
    biases: Biases | None = None,
    penalties: Penalties | None = None,
    allowed: Allowed | None = None,
) -> Verdict:
    """Samples, or judges drafts of, rows of logits without a look at the host. See `kernels.reference.sampling`."""
    judge = _implementation("verify", logits.device.type)
    return judge(logits, rows, attempt, draft=draft, biases=biases, penalties=penalties, allowed=allowed)


def accept_drafts(verdict: Verdict, row_start: torch.Tensor, tally: Tally | None = None) -> torch.Tensor:
    """How many drafts of each sequence stand, and what follows them. See `kernels.reference.sampling`."""
    return _implementation("accept_drafts", row_start.device.type)(verdict, row_start, tally)


def token_log_probs(
    logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of tokens and of the likeliest ones in some rows. See `kernels.reference.sampling`."""
    return _implementation("token_log_probs", logits.device.type)(logits, rows, tokens, top)


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
    """Drafts a block token by token. See `kernels.reference.sequential_head`."""
    likeliest = temperatures is None and not keep_weights and logits.device.type == "cpu"
    if likeliest and _native() is not None and _compiled("sequential_head", "takes")(logits, head):
        return _compiled("sequential_head", "sequential_head")(logits, hidden, anchors, head)
    return _implementation("sequential_head", logits.device.type)(
        logits, hidden, anchors, head, temperatures=temperatures, keys=keys, keep_weights=keep_weights
    )


def allocate_top(survival: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
    """Drafts of each request under a fixed capacity. See `kernels.reference.draft_budget`."""
    return _implementation("allocate_top", survival.device.type)(survival, capacity)
