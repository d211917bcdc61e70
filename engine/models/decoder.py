"""The lean decoder: one forward over a packed row of tokens for every family of `engine.models.families`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import kernels
from engine.batch import NORMALISED, ForwardBatch, ForwardOutput, FrozenParts, ModelSpec

if TYPE_CHECKING:
    from engine.kv_pool import KVPool
    from engine.models.families import Architecture, LayerShape
    from engine.models.rope import Rope
    from engine.models.weights import DecoderWeights, LayerWeights
    from kernels.native.attention_plan import NativePlan
    from kernels.reference.attention_plan import AttentionPlan


@dataclass(frozen=True, slots=True)
class _StepTables:
    """What all layers of a step share: attention plans by window, cosine and sine by rope name."""

    plans: dict[int | None, AttentionPlan | NativePlan]
    angles: dict[str, tuple[torch.Tensor, torch.Tensor]]


class LeanDecoder:
    """A `TargetModel` (engine.batch)."""

    def __init__(self, spec: ModelSpec, arch: Architecture, ropes: dict[str, Rope], weights: DecoderWeights) -> None:
        self.spec = spec
        self._arch = arch
        self._ropes = ropes
        self._weights = weights
        # Rounded to the model's type first, as transformers does: in bfloat16 sqrt(640) is 25.25.
        self._embedding_scale = torch.tensor(arch.embedding_scale, dtype=spec.dtype, device=spec.device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KVPool) -> ForwardOutput:
        """See `TargetModel.forward`. A tap is the residual stream, before the next layer's norm."""
        tables = self._tables(batch, kv)
        hidden = self._weights.embedding.index_select(0, batch.token_ids)
        if self._arch.embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale
        taps = {0: hidden} if 0 in batch.taps else {}
        last = len(self._arch.layers)
        whole = last in batch.taps or NORMALISED in batch.taps
        for index, (layer, shape) in enumerate(zip(self._weights.layers, self._arch.layers, strict=True), start=1):
            attended = self._attend(layer, shape, hidden, tables, kv.keys[index - 1], kv.values[index - 1])
            if index == last and not whole:
                # Nobody reads the other rows: the last layer's output projection and MLP run on these alone.
                attended, hidden = attended.index_select(0, batch.logit_rows), hidden.index_select(0, batch.logit_rows)
            hidden = self._finish_layer(layer, attended, hidden)
            if index in batch.taps:
                taps[index] = hidden
        if NORMALISED in batch.taps:
            taps[NORMALISED] = kernels.rms_norm(hidden, self._weights.norm, self._arch.norm_eps)
        if whole:
            hidden = hidden.index_select(0, batch.logit_rows)
        return ForwardOutput(self._logits(hidden), taps)

    def frozen(self) -> FrozenParts:
        """See `TargetModel.frozen`."""
        weights = self._weights
        return FrozenParts(
            embedding=weights.embedding,
            norm=lambda hidden: kernels.rms_norm(hidden, weights.norm, self._arch.norm_eps),
            head=lambda hidden: kernels.linear(hidden, weights.head).float(),
        )

    def _tables(self, batch: ForwardBatch, kv: KVPool) -> _StepTables:
        plans: dict[int | None, AttentionPlan | NativePlan] = {}
        for window in {shape.window for shape in self._arch.layers}:
            wide = window is None or window >= batch.max_kv
            key = None if wide else window
            if key not in plans:
                plans[key] = kernels.plan_attention(
                    batch.block_tables,
                    batch.query_start,
                    batch.kv_lengths,
                    batch.slots,
                    cache=kv.keys[0],
                    num_heads=self._arch.num_heads,
                    window=key,
                )
            plans[window] = plans[key]
        return _StepTables(plans, {name: rope.angles(batch.positions, self.spec.dtype) for name, rope in self._ropes.items()})

    def _attend(
        self,
        layer: LayerWeights,
        shape: LayerShape,
        hidden: torch.Tensor,
        tables: _StepTables,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Attention before its output projection: [T, heads * head_dim]."""
        arch = self._arch
        x = hidden if layer.attention_norm is None else kernels.rms_norm(hidden, layer.attention_norm, arch.norm_eps)
        qkv = kernels.linear(x, layer.qkv)
        if layer.q_norm is not None:
            qkv = self._normalise_qk(layer, qkv)
        plan = tables.plans[shape.window]
        cos, sin = (None, None) if shape.rope is None else tables.angles[shape.rope]
        q = kernels.rotary_kv_write(qkv, cos, sin, plan.slots, keys, values, num_heads=arch.num_heads)
        attended = kernels.attention(q, keys, values, plan, arch.attention_scale, arch.attention_soft_cap)
        return attended.view(len(qkv), -1)

    def _normalise_qk(self, layer: LayerWeights, qkv: torch.Tensor) -> torch.Tensor:
        arch = self._arch
        assert layer.q_norm is not None
        assert layer.k_norm is not None
        sizes = (arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim)
        parts = qkv.split(sizes, dim=-1)
        normed = []
        for part, weight in zip(parts, (layer.q_norm, layer.k_norm), strict=False):
            rows = part.unflatten(-1, (-1, len(weight)))
            normed.append(kernels.rms_norm(rows, weight, arch.norm_eps).flatten(1))
        return torch.cat((*normed, parts[2]), dim=-1)

    def _finish_layer(self, layer: LayerWeights, attended: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Output projection, MLP and both residual additions; the additions ride on the products where no norm comes between."""
        eps = self._arch.norm_eps
        if layer.attention_post_norm is None:
            hidden = kernels.linear(attended, layer.attention_out, residual=hidden)
        else:
            hidden = hidden + kernels.rms_norm(kernels.linear(attended, layer.attention_out), layer.attention_post_norm, eps)
        x = hidden if layer.mlp_norm is None else kernels.rms_norm(hidden, layer.mlp_norm, eps)
        x = kernels.gated_linear(x, layer.gate_up, self._arch.activation)
        if layer.mlp_post_norm is None:
            return kernels.linear(x, layer.down, residual=hidden)
        return hidden + kernels.rms_norm(kernels.linear(x, layer.down), layer.mlp_post_norm, eps)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        arch = self._arch
        x = kernels.rms_norm(hidden, self._weights.norm, arch.norm_eps)
        logits = kernels.linear(x, self._weights.head).float()
        if arch.logit_scale != 1.0:
            logits = logits * arch.logit_scale
        if arch.logit_soft_cap is not None:
            logits = torch.tanh(logits / arch.logit_soft_cap) * arch.logit_soft_cap
        return logits
