"""Transformer layers of draft models: weights, and the pieces round their attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import kernels
from engine.drafters.parts.frozen import read_from_memory
from engine.models.rope import Rope, read_ropes

if TYPE_CHECKING:
    from engine.checkpoints.drafters.specs import LayerSpec
    from kernels.reference.linear import PackedLinear

_ROPE_KEYS = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "num_hidden_layers", "layer_types", "global_head_dim", "num_global_key_value_heads", "attention_k_eq_v",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DraftLayer:
    """hidden_norm: of EAGLE-3's feature half. The post norms and the scalar are Gemma's. Norms: [hidden]; q_norm, k_norm: [head_dim]."""

    input_norm: torch.Tensor
    hidden_norm: torch.Tensor | None
    qkv: PackedLinear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: PackedLinear
    attention_post_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear
    mlp_post_norm: torch.Tensor | None
    scalar: torch.Tensor | None


class Weights:
    """Hands out tensors that were checked before, cast and moved.

    A drafter in float32 that a CPU would read from memory for every block has its products in eight bits: drafts need not be those of
    the last bit, and a quarter of the bytes is read.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self._tensors = tensors
        self.dtype = dtype
        self.device = device
        nbytes = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        self._int8 = read_from_memory(nbytes, dtype, device)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str) -> torch.Tensor:
        return self._tensors[name].to(device=self.device, dtype=self.dtype)

    def maybe(self, name: str) -> torch.Tensor | None:
        return self.take(name) if name in self._tensors else None

    def integers(self, name: str) -> torch.Tensor:
        return self._tensors[name].to(device=self.device, dtype=torch.int64)

    def linear(self, *names: str) -> PackedLinear:
        """One product for several projections of the same input, stacked along the output."""
        biases = [bias for name in names if (bias := self.maybe(f"{name}.bias")) is not None]
        pieces = [self._tensors[f"{name}.weight"].to(self.device) for name in names]
        return kernels.pack_linear(pieces, torch.cat(biases) if biases else None, int8=self._int8, dtype=self.dtype)

    def gated(self, gate: str, up: str, activation: str) -> PackedLinear:
        """For `kernels.gated_linear`."""
        pieces = [self._tensors[f"{name}.weight"].to(self.device) for name in (gate, up)]
        return kernels.pack_gated_linear(pieces, activation, int8=self._int8, dtype=self.dtype)


def take_layer(weights: Weights, spec: LayerSpec, prefix: str) -> DraftLayer:
    """The layer whose tensors begin with `prefix`."""
    qkv = ("q_proj", "k_proj") if spec.keys_are_values else ("q_proj", "k_proj", "v_proj")
    sandwich = spec.sandwich
    return DraftLayer(
        input_norm=weights.take(f"{prefix}input_layernorm.weight"),
        hidden_norm=weights.maybe(f"{prefix}hidden_norm.weight"),
        qkv=weights.linear(*(f"{prefix}self_attn.{name}" for name in qkv)),
        q_norm=weights.maybe(f"{prefix}self_attn.q_norm.weight"),
        k_norm=weights.maybe(f"{prefix}self_attn.k_norm.weight"),
        out=weights.linear(f"{prefix}self_attn.o_proj"),
        attention_post_norm=weights.take(f"{prefix}post_attention_layernorm.weight") if sandwich else None,
        mlp_norm=weights.take(f"{prefix}{'pre_feedforward' if sandwich else 'post_attention'}_layernorm.weight"),
        gate_up=weights.gated(f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj", spec.activation),
        down=weights.linear(f"{prefix}mlp.down_proj"),
        mlp_post_norm=weights.maybe(f"{prefix}post_feedforward_layernorm.weight"),
        scalar=weights.maybe(f"{prefix}layer_scalar"),
    )


def context_projection(weights: Weights, spec: LayerSpec) -> PackedLinear:
    """Keys and values of every layer from one feature, in one product: [layers * 2 * kv_heads * head_dim, hidden], layer by layer."""
    names = ("k_proj",) if spec.keys_are_values else ("k_proj", "v_proj")
    return weights.linear(*(f"layers.{index}.self_attn.{name}" for index in range(spec.num_layers) for name in names))


def finish_keys(
    layer: DraftLayer, spec: LayerSpec, k: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Normalises and rotates keys [T, kv_heads, head_dim]. Also returns the values where they are the same projection, else None."""
    v = unweighted_norm(k, spec.norm_eps) if spec.keys_are_values else None
    normed = k if layer.k_norm is None else kernels.rms_norm(k, layer.k_norm, spec.norm_eps)
    return kernels.rotary(normed, *angles), v


def unweighted_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    return kernels.rms_norm(x, torch.ones(x.shape[-1], dtype=x.dtype, device=x.device), eps)


def attention_inputs(
    layer: DraftLayer, spec: LayerSpec, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [T, heads, head_dim], keys and values [T, kv_heads, head_dim] of normalised input x."""
    rows = kernels.linear(x, layer.qkv).view(len(x), -1, spec.head_dim)
    q = rows[:, : spec.num_heads]
    if layer.q_norm is not None:
        q = kernels.rms_norm(q, layer.q_norm, spec.norm_eps)
    k, v = finish_keys(layer, spec, rows[:, spec.num_heads : spec.num_heads + spec.num_kv_heads], angles)
    if v is None:
        v = rows[:, spec.num_heads + spec.num_kv_heads :]
        v = unweighted_norm(v, spec.norm_eps) if spec.sandwich else v
    return kernels.rotary(q, *angles), k, v


def finish_layer(layer: DraftLayer, spec: LayerSpec, attended: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Output projection, MLP and both residual additions; attended: [T, heads * head_dim]."""
    if layer.attention_post_norm is None:
        hidden = kernels.linear(attended, layer.out, residual=hidden)
    else:
        hidden = hidden + kernels.rms_norm(kernels.linear(attended, layer.out), layer.attention_post_norm, spec.norm_eps)
    x = kernels.gated_linear(kernels.rms_norm(hidden, layer.mlp_norm, spec.norm_eps), layer.gate_up, spec.activation)
    if layer.mlp_post_norm is None:
        hidden = kernels.linear(x, layer.down, residual=hidden)
    else:
        hidden = hidden + kernels.rms_norm(kernels.linear(x, layer.down), layer.mlp_post_norm, spec.norm_eps)
    return hidden if layer.scalar is None else hidden * layer.scalar


def read_rope(spec: LayerSpec, device: torch.device) -> Rope:
    """From transformers' own module for this model type, so that every scaling type is theirs."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(spec.rope_type, **{key: spec.rope[key] for key in _ROPE_KEYS if spec.rope.get(key) is not None})
    name = "full_attention" if spec.sandwich else "all"
    return read_ropes(_rotary_module(spec.rope_type), config, {name}, device)[name]


def _rotary_module(model_type: str) -> Any:
    if model_type == "gemma4_text":
        from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

        return Gemma4TextRotaryEmbedding
    if model_type == "llama":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        return LlamaRotaryEmbedding
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    return Qwen3RotaryEmbedding
