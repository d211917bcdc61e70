"""The lean decoder: one forward over a packed row of tokens for every family of `engine.models.families`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import kernels
from engine.batch import NORMALISED, ForwardBatch, ForwardOutput, FrozenParts, ModelSpec, Peaks
from engine.models.few_rows import MOST_ROWS, FewRows

if TYPE_CHECKING:
    from engine.kv_pool import KVPool
    from engine.models.families import Architecture, LayerShape
    from engine.models.rope import Rope
    from engine.models.weights import DecoderWeights, LayerWeights, Packed
    from kernels.native.attention_plan import NativePlan
    from kernels.reference.attention_plan import AttentionPlan


@dataclass(frozen=True, slots=True)
class _StepTables:
    """What all layers of a step share: attention plans by window, cosine and sine by rope name."""

    plans: dict[int | None, AttentionPlan | NativePlan]
    angles: dict[str, tuple[torch.Tensor, torch.Tensor]]


class LeanDecoder:
    """A `TargetModel` (engine.batch).

    `reads_fp8`: it writes and reads KV caches in eight bits, with scales.
    """

    reads_fp8 = True

    def __init__(
        self, spec: ModelSpec, arch: Architecture, ropes: dict[str, Rope], weights: DecoderWeights, *, fused_norms: bool | None = None
    ) -> None:
        """fused_norms: additions to the residual stream ride on the norms after them instead of on the products before them, and per-head
        norms on the rotation; None: on a GPU, where each of them would be a pass of its own.
        """
        self.spec = spec
        self._fused = spec.device.type == "cuda" if fused_norms is None else fused_norms
        self._arch = arch
        self._ropes = ropes
        self._weights = weights
        self._few_rows = FewRows.of(spec, arch, weights)
        # What is done to logits afterwards could make two of them equal.
        plain = arch.logit_scale == 1.0 and arch.logit_soft_cap is None
        self._screened = plain and _is_screened(weights.head)
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
        if (at_once := self._at_once(hidden, batch, tables, kv)) is not None:
            hidden, tapped = at_once
            if not whole and len(batch.logit_rows) < len(hidden):
                hidden = hidden.index_select(0, batch.logit_rows)
            return self._output(self._norm(hidden, self._weights.norm), batch, taps | tapped, whole=whole)
        norms = [*(layer.attention_norm for layer in self._weights.layers[1:]), self._weights.norm]
        normed = self._norm(hidden, self._weights.layers[0].attention_norm)
        for index, (layer, shape) in enumerate(zip(self._weights.layers, self._arch.layers, strict=True), start=1):
            attended = self._attend(layer, shape, normed, tables, kv, index - 1)
            if index == last and not whole:
                # Nobody reads the other rows: the last layer's output projection and MLP run on these alone.
                attended, hidden = attended.index_select(0, batch.logit_rows), hidden.index_select(0, batch.logit_rows)
            hidden, normed = self._finish_layer(layer, attended, hidden, norms[index - 1])
            if index in batch.taps:
                taps[index] = hidden
        return self._output(normed, batch, taps, whole=whole)

    def _output(self, normed: torch.Tensor, batch: ForwardBatch, taps: dict[int, torch.Tensor], *, whole: bool) -> ForwardOutput:
        """`whole`: `normed` has all rows, not only those that want logits."""
        if NORMALISED in batch.taps:
            taps[NORMALISED] = normed
        rows = normed.index_select(0, batch.logit_rows) if whole else normed
        if batch.peaks and self._screened:
            return ForwardOutput(rows.new_empty(0, self.spec.vocab_size), taps, Peaks(*kernels.linear_peaks(rows, self._weights.head)))
        return ForwardOutput(self._logits(rows), taps)

    def _at_once(
        self, hidden: torch.Tensor, batch: ForwardBatch, tables: _StepTables, kv: KVPool
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]] | None:
        """All layers in one call, where there is a way and most rows are wanted to the end."""
        if self._few_rows is None or 2 * len(batch.logit_rows) < len(hidden) or len(hidden) > MOST_ROWS:
            return None
        return self._few_rows.run(hidden, tables.plans, tables.angles, kv, batch.taps)

    def frozen(self) -> FrozenParts:
        """See `TargetModel.frozen`."""
        weights = self._weights
        return FrozenParts(
            embedding=weights.embedding,
            norm=lambda hidden: kernels.rms_norm(hidden, weights.norm, self._arch.norm_eps),
            head=lambda hidden: kernels.linear(hidden, weights.head).float(),
            tied=weights.tied,
            rough_head=(lambda hidden: kernels.rough_linear(hidden, weights.head)) if _is_screened(weights.head) else None,
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
        x: torch.Tensor,
        tables: _StepTables,
        kv: KVPool,
        index: int,
    ) -> torch.Tensor:
        """Attention of normalised x before its output projection: [T, heads * head_dim]. index: of the layer."""
        arch = self._arch
        qkv = kernels.linear(x, layer.qkv)
        on_the_way = self._fused and arch.family.qk_norm == "head"
        if layer.q_norm is not None and not on_the_way:
            qkv = self._normalise_qk(layer, qkv)
        plan = tables.plans[shape.window]
        cos, sin = (None, None) if shape.rope is None else tables.angles[shape.rope]
        keys, values, k_scale, v_scale = kv.keys[index], kv.values[index], kv.k_scales[index], kv.v_scales[index]
        q = kernels.rotary_kv_write(
            qkv, cos, sin, plan.slots, keys, values, num_heads=arch.num_heads, q_norm=layer.q_norm if on_the_way else None,
            k_norm=layer.k_norm if on_the_way else None, eps=arch.norm_eps, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        attended = kernels.attention(q, keys, values, plan, arch.attention_scale, arch.attention_soft_cap, k_scale=k_scale, v_scale=v_scale)
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

    def _finish_layer(
        self, layer: LayerWeights, attended: torch.Tensor, hidden: torch.Tensor, following: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output projection, MLP and both residual additions: the residual stream, and normalised by `following` for what comes next."""
        hidden, x = self._add(hidden, attended, layer.attention_out, layer.attention_post_norm, layer.mlp_norm)
        x = kernels.gated_linear(x, layer.gate_up, self._arch.activation)
        return self._add(hidden, x, layer.down, layer.mlp_post_norm, following)

    def _add(
        self, hidden: torch.Tensor, x: torch.Tensor, weight: Packed, post_norm: torch.Tensor | None, norm: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden + post_norm(x @ weight), and that normalised by `norm`."""
        eps = self._arch.norm_eps
        if post_norm is None and not (self._fused and norm is not None):
            hidden = kernels.linear(x, weight, residual=hidden)
            return hidden, self._norm(hidden, norm)
        delta = kernels.linear(x, weight)
        if post_norm is not None:
            delta = kernels.rms_norm(delta, post_norm, eps)
        if self._fused and norm is not None:
            normed, hidden = kernels.add_rms_norm(delta, hidden, norm, eps)
            return hidden, normed
        hidden = hidden + delta
        return hidden, self._norm(hidden, norm)

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return hidden if weight is None else kernels.rms_norm(hidden, weight, self._arch.norm_eps)

    def _logits(self, normed: torch.Tensor) -> torch.Tensor:
        arch = self._arch
        logits = kernels.linear(normed, self._weights.head).float()
        if arch.logit_scale != 1.0:
            logits = logits * arch.logit_scale
        if arch.logit_soft_cap is not None:
            logits = torch.tanh(logits / arch.logit_soft_cap) * arch.logit_soft_cap
        return logits


def _is_screened(head: Packed) -> bool:
    return getattr(head, "screen", None) is not None
