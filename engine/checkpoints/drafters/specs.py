"""What the two neural drafter families compute with, whatever layout they came in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """A draft model's transformer layers: sizes, and where they differ from Qwen3's.

    rope: the config that transformers' rotary module `rope_type` is built from. sandwich: Gemma's norms after attention and MLP, a
    layer scalar, and values normalised without weights. keys_are_values: one projection serves as both.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    activation: str
    attention_bias: bool
    attention_scale: float
    qk_norm: bool
    rope_type: str
    rope: dict[str, Any]
    sandwich: bool = False
    keys_are_values: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetNeeds:
    """What the target must be like. None: the checkpoint does not say."""

    hidden_size: int
    vocab_size: int
    num_layers: int | None = None
    model_type: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec:
    """A DSpark or DFlash drafter.

    taps: hidden-state indices of the target. predicts_next: slot k of a block guesses the token after it (block_size drafts a block), else
    its own (one less). windows: per layer, None for all of the context; causal_windows: a windowed layer sees no later slot either.
    draft_vocab_size: what `d2t` maps from, the target's own vocabulary otherwise.
    """

    format: str
    layers: LayerSpec
    needs: TargetNeeds
    taps: tuple[int, ...]
    block_size: int
    mask_token_id: int
    predicts_next: bool
    windows: tuple[int | None, ...]
    causal_windows: bool = False
    draft_vocab_size: int
    markov_rank: int = 0
    markov_type: Literal["vanilla", "gated", "rnn"] = "vanilla"
    confidence: bool = False
    confidence_with_markov: bool = False
    embedding_scale: float = 1.0
    logit_soft_cap: float | None = None
    stored: frozenset[str] = field(default_factory=frozenset)
    """Tensors that the layout always holds beside the layers: `embed_tokens.weight`, `lm_head.weight`, `d2t`, `t2d`."""

    @property
    def drafts_per_block(self) -> int:
        return self.block_size if self.predicts_next else self.block_size - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleSpec:
    """An EAGLE-3 drafter. The first layer reads [embedding; feature]; `all_fused`: so do the others.

    prefix: `midlayer` in the original layout, else empty. norm_before_residual: the feature joins the residual normalised.
    norm_before_fc: the joined taps are normalised first. own_embedding: `embed_tokens.weight` must be there.
    """

    format: str
    layers: LayerSpec
    needs: TargetNeeds
    taps: tuple[int, ...]
    target_hidden_size: int
    draft_vocab_size: int
    prefix: str = ""
    all_fused: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    own_embedding: bool = False
