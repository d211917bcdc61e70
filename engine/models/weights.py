"""From checkpoint tensors to the fused, packed weights of the lean decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

import kernels
from kernels.pages import zeros
from kernels.reference.fp8_linear import FP8_STEP, Fp8Linear, dequantise

if TYPE_CHECKING:
    from engine.checkpoints.fp8 import Fp8Scales
    from engine.models.families import Architecture
    from kernels.reference.linear import PackedLinear


Packed: TypeAlias = "PackedLinear | Fp8Linear"

_LARGE = 1 << 20


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; norms are [hidden_size], q_norm and k_norm [head_dim] or [heads * head_dim], None where the family has none."""

    attention_norm: torch.Tensor | None
    qkv: Packed
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    attention_out: Packed
    attention_post_norm: torch.Tensor | None
    mlp_norm: torch.Tensor | None
    gate_up: Packed
    down: Packed
    mlp_post_norm: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """embedding: [vocab, hidden]. head: packed [vocab, hidden], a second copy of a tied embedding where packing copies.

    tied: the head has the embedding's numbers, to the last bit.
    """

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: Packed
    tied: bool


def pack_weights(
    tensors: dict[str, torch.Tensor],
    arch: Architecture,
    *,
    tied: bool,
    dtype: torch.dtype,
    device: torch.device,
    scales: Fp8Scales,
    int8: bool = False,
) -> DecoderWeights:
    """Consumes `tensors` (transformers' names), layer by layer, so that a checkpoint is never held twice as a whole.

    int8: products keep their weights as eight-bit integers with a scale for each output; the embedding stays as it is.
    Raises ValueError naming tensors that are missing or that nothing took.
    """
    source = _Source(tensors, dtype, device, scales, int8)
    embedding = source.keep("model.embed_tokens.weight")
    weights = DecoderWeights(
        embedding=embedding,
        layers=tuple(_pack_layer(source, arch, f"model.layers.{index}.") for index in range(len(arch.layers))),
        norm=_norm(source, arch, "model.norm"),
        head=kernels.pack_linear(embedding if tied else source.pieces("lm_head.weight"), int8=int8, dtype=dtype, screened=True),
        tied=tied and not int8,
    )
    if tensors:
        raise ValueError(f"the checkpoint has tensors that this model does not use: {', '.join(sorted(tensors)[:8])}")
    return weights


class _Source:
    """Hands out each tensor once, cast and moved. On a CPU what is packed is cast on the way, so that no copy of it comes in between."""

    def __init__(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device, scales: Fp8Scales, int8: bool) -> None:
        self._int8 = int8
        self._scales = scales
        self._tensors = tensors
        self._dtype = dtype
        self._device = device

    def take(self, name: str) -> torch.Tensor:
        return self._stored(name).to(self._dtype)

    def pieces(self, *names: str) -> list[torch.Tensor]:
        """For `kernels.pack_linear`."""
        return [self._stored(name) for name in names]

    def _stored(self, name: str) -> torch.Tensor:
        """Moved, but in the type that it is stored in, unless that needs a scale."""
        if name not in self._tensors:
            raise ValueError(f"the checkpoint lacks {name}")
        tensor = self._tensors.pop(name).to(self._device)
        scale = self._scales.by_name.get(name)
        return tensor if scale is None else dequantise(tensor, scale.to(self._device), self._scales.block, self._dtype)

    def keep(self, name: str) -> torch.Tensor:
        """As `take`, in memory of its own: what is left in a mapped file keeps all of that file in the process."""
        stored = self._tensors.get(name)
        tensor = self.take(name)
        if stored is None or tensor.data_ptr() != stored.data_ptr():
            return tensor
        return zeros(tensor.shape, tensor.dtype).copy_(tensor) if tensor.nbytes > _LARGE and tensor.device.type == "cpu" else tensor.clone()

    def take_if_present(self, name: str) -> torch.Tensor | None:
        return self.take(name) if name in self._tensors else None

    def linear(self, prefix: str, parts: tuple[str, ...], scale: float = 1.0) -> Packed:
        """One product for several projections of the same input, stacked along the output."""
        names = [f"{prefix}{part}.weight" for part in parts]
        stored = None if not self._scales.keep else self._fp8(names)
        pieces = self.pieces(*names) if stored is None else []
        biases = [self.take_if_present(f"{prefix}{part}.bias") for part in parts]
        present = [bias for bias in biases if bias is not None]
        if present and len(present) < len(parts):
            raise ValueError(f"{prefix}{{{','.join(parts)}}}: some have a bias and some have none")
        bias = torch.cat(present) if present else None
        if scale != 1.0:
            bias = None if bias is None else bias * scale
        if stored is not None:
            return Fp8Linear(stored[0], stored[1] * scale, self._scales.block, bias)
        if scale != 1.0:
            pieces = [piece.to(self._dtype) * scale for piece in pieces]
        return kernels.pack_linear(pieces, bias, int8=self._int8, dtype=self._dtype)

    def _fp8(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weights and scales of `names` stacked as they are stored; None where they are not fp8, or blocks would straddle two of them."""
        scales = [self._scales.by_name.get(name) for name in names]
        known = [scale for scale in scales if scale is not None]
        aligned = all(self._tensors[name].shape[0] % self._scales.block[0] == 0 for name in names[:-1] if name in self._tensors)
        if len(known) < len(names) or not aligned or self._scales.block[1] % FP8_STEP:
            return None
        weights = [self._tensors.pop(name).to(self._device) for name in names]
        return torch.cat(weights), torch.cat(known).to(self._device)

    def gated(self, prefix: str, parts: tuple[str, ...], activation: str) -> Packed:
        """Gate and up as one product, the activation fused into it where there is no bias and nothing stays in eight bits."""
        if self._scales.keep or f"{prefix}{parts[0]}.bias" in self._tensors:
            return self.linear(prefix, parts)
        pieces = self.pieces(*(f"{prefix}{part}.weight" for part in parts))
        return kernels.pack_gated_linear(pieces[0] if len(pieces) == 1 else pieces, activation, int8=self._int8, dtype=self._dtype)


def _norm(source: _Source, arch: Architecture, name: str) -> torch.Tensor:
    weight = source.keep(f"{name}.weight")
    return weight + 1.0 if arch.family.unit_offset else weight


def _pack_layer(source: _Source, arch: Architecture, prefix: str) -> LayerWeights:
    family = arch.family
    qkv = ("self_attn.qkv_proj",) if family.fused_checkpoint else ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up = ("mlp.gate_up_proj",) if family.fused_checkpoint else ("mlp.gate_proj", "mlp.up_proj")

    def norm(name: str | None) -> torch.Tensor | None:
        return None if name is None else _norm(source, arch, prefix + name)

    has_qk_norm = family.qk_norm != "none"
    return LayerWeights(
        attention_norm=norm(family.attention_norms[0]),
        qkv=source.linear(prefix, qkv),
        q_norm=norm("self_attn.q_norm" if has_qk_norm else None),
        k_norm=norm("self_attn.k_norm" if has_qk_norm else None),
        attention_out=source.linear(prefix, ("self_attn.o_proj",), arch.residual_scale),
        attention_post_norm=norm(family.attention_norms[1]),
        mlp_norm=norm(family.mlp_norms[0]),
        gate_up=source.gated(prefix, gate_up, arch.activation),
        down=source.linear(prefix, ("mlp.down_proj",), arch.residual_scale),
        mlp_post_norm=norm(family.mlp_norms[1]),
    )
