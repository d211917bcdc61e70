"""What sets each model family of the lean decoder apart, and the per-model facts derived from its config.

Adding a family is a record here, if its layer is: [norm] attention [norm] + residual, [norm] gated MLP [norm] + residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Differences from Llama, in terms of transformers' checkpoint names.

    attention_norms, mlp_norms: the layer's norm weights before and after each half, None where there is none.
    qk_norm: queries and keys are normalised per head (over head_dim) or per row (over all heads at once).
    unit_offset: norms scale by (1 + weight). scaled_embedding: embeddings are multiplied by sqrt(hidden_size).
    fused_checkpoint: the checkpoint stores `qkv_proj` and `gate_up_proj` as one tensor each.
    window: `layer_types` names the sliding layers, or `sliding_window` holds for all of them.
    soft_capped: the config may carry `attn_logit_softcapping` and `final_logit_softcapping`.
    multipliers: the config carries Granite's embedding, residual, attention and logits factors.
    """

    attention_norms: tuple[str | None, str | None] = ("input_layernorm", None)
    mlp_norms: tuple[str | None, str | None] = ("post_attention_layernorm", None)
    qk_norm: Literal["none", "head", "row"] = "none"
    unit_offset: bool = False
    scaled_embedding: bool = False
    fused_checkpoint: bool = False
    window: Literal["none", "layer_types", "all"] = "none"
    soft_capped: bool = False
    multipliers: bool = False


_GEMMA = Family(
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    unit_offset=True,
    scaled_embedding=True,
    window="layer_types",
    soft_capped=True,
)
_GEMMA3 = Family(
    attention_norms=_GEMMA.attention_norms,
    mlp_norms=_GEMMA.mlp_norms,
    qk_norm="head",
    unit_offset=True,
    scaled_embedding=True,
    window="layer_types",
    soft_capped=True,
)
_OLMO2 = Family(
    attention_norms=(None, "post_attention_layernorm"),
    mlp_norms=(None, "post_feedforward_layernorm"),
    qk_norm="row",
)

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(window="all"),
    "qwen2": Family(window="layer_types"),
    "qwen3": Family(window="layer_types", qk_norm="head"),
    "gemma": Family(unit_offset=True, scaled_embedding=True),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA3,
    "olmo2": _OLMO2,
    "phi3": Family(fused_checkpoint=True, window="all"),
    "granite": Family(multipliers=True),
    "smollm3": Family(window="layer_types"),
}
"""By `config.model_type`. What is not listed runs through `engine.models.fallback`."""

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Of one layer. window: visible tokens, None for all. rope: name of its angle table, None for no rotation."""

    window: int | None
    rope: str | None


@dataclass(frozen=True, slots=True)
class Architecture:
    """A config read through its family: everything `LeanDecoder` computes with."""

    family: Family
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    activation: str
    attention_scale: float
    attention_soft_cap: float | None
    logit_soft_cap: float | None
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    layers: tuple[LayerShape, ...]


def read_architecture(config: Any) -> Architecture:
    """Reads a transformers config of one of `FAMILIES`. Raises ValueError for what the lean decoder would get wrong."""
    family = FAMILIES[config.model_type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported, only {', '.join(sorted(_ACTIVATIONS))}")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError("use_bidirectional_attention is set: this model is an encoder, not a causal decoder")
    scale = getattr(config, "query_pre_attn_scalar", None) or head_dim
    factors = config if family.multipliers else None
    return Architecture(
        family=family,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_positions=max_positions(config),
        norm_eps=config.rms_norm_eps,
        activation=_ACTIVATIONS[activation],
        attention_scale=factors.attention_multiplier if factors else scale**-0.5,
        attention_soft_cap=config.attn_logit_softcapping if family.soft_capped else None,
        logit_soft_cap=config.final_logit_softcapping if family.soft_capped else None,
        embedding_scale=factors.embedding_multiplier if factors else config.hidden_size**0.5 if family.scaled_embedding else 1.0,
        residual_scale=factors.residual_multiplier if factors else 1.0,
        logit_scale=1.0 / factors.logits_scaling if factors else 1.0,
        layers=tuple(_layer_shape(config, family, index) for index in range(config.num_hidden_layers)),
    )


def max_positions(config: Any) -> int:
    """Context length whose positions mean the same to every token.

    `longrope` and `dynamic` scaling change the frequencies of *all* positions once a sequence outgrows the original length, which
    keys already cached cannot follow, so such models stop there.
    """
    limits = [int(config.max_position_embeddings)]
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") == "longrope":
            original = part.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            limits.append(int(original or config.max_position_embeddings))
    return min(limits)


def _layer_shape(config: Any, family: Family, index: int) -> LayerShape:
    layer_types = getattr(config, "layer_types", None)
    layer_type = layer_types[index] if layer_types else "full_attention"
    if layer_type not in ("full_attention", "sliding_attention"):
        raise ValueError(f"layer {index} is of type {layer_type!r}, only full and sliding attention are supported")
    sliding = family.window == "all" or (family.window == "layer_types" and layer_type == "sliding_attention")
    rope_per_type = layer_type in (getattr(config, "rope_parameters", None) or {})
    with_rope = getattr(config, "no_rope_layers", None)
    return LayerShape(
        window=getattr(config, "sliding_window", None) if sliding else None,
        rope=None if with_rope and not with_rope[index] else layer_type if rope_per_type else "all",
    )
