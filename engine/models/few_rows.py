"""All layers of a lean decoder in one call, for steps of few rows on a CPU: there Python between two kernels is a tenth of the step.

The kernels and their order are those of `LeanDecoder`, so the results are the same to the last bit.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from kernels import native
from kernels.native.attention_plan import NativePlan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from engine.batch import ModelSpec
    from engine.kv_pool import KVPool
    from engine.models.families import Architecture
    from engine.models.weights import DecoderWeights, LayerWeights, Packed
    from kernels.native.program import Call
    from kernels.reference.linear import PackedLinear

    Angles = Mapping[str, tuple[torch.Tensor, torch.Tensor]]

MOST_ROWS = 128
"""Beyond them a step takes so long that nobody notices."""
_MOST_WAVES = 4
"""Of attention, with prefixes shared within prefixes."""
_NORM, _QKV, _ROTATION, _ATTENTION = range(4)
_OUT, _MLP_NORM, _GATED, _DOWN, _CALLS = range(_ATTENTION + _MOST_WAVES, _ATTENTION + _MOST_WAVES + 5)


class FewRows:
    """Fits models whose layers are norm, attention, norm, gated product, in layouts of the compiled kernels (`FewRows.of`)."""

    def __init__(self, arch: Architecture, weights: DecoderWeights) -> None:
        self._arch, self._weights = arch, weights
        first = weights.layers[0]
        heads, kv_heads, dim = arch.num_heads, arch.num_kv_heads, arch.head_dim
        hidden = weights.embedding.shape[1]
        self._columns = (heads + 2 * kv_heads) * dim
        self._hidden, self._normed = torch.empty(2, MOST_ROWS, hidden)
        self._qkv = torch.empty(MOST_ROWS, first.qkv.weight.shape[0] * first.qkv.weight.shape[2])
        self._attended = torch.empty(MOST_ROWS, heads, dim)
        self._gated = torch.empty(MOST_ROWS, first.gate_up.weight.shape[0] * first.gate_up.weight.shape[2] // 2)
        self._kv: weakref.ref[KVPool] | None = None
        self._template: NDArray[np.int64] = np.empty((0, 0), np.int64)
        self._table = self._template
        self._busy = threading.Lock()
        """There is one set of buffers; whoever comes meanwhile runs kernel by kernel."""

    @staticmethod
    def of(spec: ModelSpec, arch: Architecture, weights: DecoderWeights) -> FewRows | None:
        """None where the model is of another build, or its weights of another layout."""
        if spec.device.type != "cpu" or spec.dtype != torch.float32 or not native.available():
            return None
        fits = all(_fits(layer, spec.hidden_size) for layer in weights.layers) and weights.embedding.shape[1] == spec.hidden_size
        return FewRows(arch, weights) if fits else None

    @torch.inference_mode()
    def run(
        self,
        hidden: torch.Tensor,
        plans: Mapping[int | None, object],
        angles: Angles,
        kv: KVPool,
        taps: tuple[int, ...],
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]] | None:
        """hidden [T, hidden_size] after all layers (valid until the next call), and the residual stream after the layers in `taps`.

        None where this step needs another path; nothing has been done then.
        """
        rows = len(hidden)
        chosen = {shape.window: plans[shape.window] for shape in self._arch.layers}
        native_plans = {window: plan for window, plan in chosen.items() if isinstance(plan, NativePlan) and len(plan.waves) <= _MOST_WAVES}
        turns = all(native.takes_rotation(cos) for cos, _ in angles.values())
        if not 0 < rows <= MOST_ROWS or len(native_plans) < len(chosen) or not turns or not self._busy.acquire(blocking=False):
            return None
        try:
            self._hidden[:rows] = hidden
            self._prepare(rows, native_plans, angles, kv)
            return self._hidden[:rows], self._run(rows, taps)
        finally:
            self._busy.release()

    def _run(self, rows: int, taps: tuple[int, ...]) -> dict[int, torch.Tensor]:
        from kernels.native import program

        last = len(self._weights.layers)
        wanted = sorted(tap for tap in taps if 0 < tap <= last)
        tapped, done = {}, 0
        for stop in (*wanted, last):
            if stop > done:
                program.run(self._table[done * _CALLS : stop * _CALLS])
                done = stop
            if stop in wanted:
                tapped[stop] = self._hidden[:rows].clone()
        return tapped

    def _prepare(self, rows: int, plans: Mapping[int | None, NativePlan], angles: Angles, kv: KVPool) -> None:
        """Writes into the table what is this step's."""
        from kernels.native import attention, linear, program
        from kernels.native import rows as row_kernels

        if self._kv is None or self._kv() is not kv:
            self._template = np.concatenate([self._layer(index, kv) for index in range(len(self._weights.layers))])
            self._table = np.empty_like(self._template)
            self._kv = weakref.ref(kv)
        layers = np.arange(len(self._weights.layers))
        changing = {_NORM: row_kernels.NORM_CHANGING, _MLP_NORM: row_kernels.NORM_CHANGING}
        for place, call in self._products_and_norms(self._weights.layers[0], rows):
            program.fill(self._template, layers * _CALLS + place, call, changing.get(place, linear.CHANGING))
        kinds = {(shape.window, shape.rope) for shape in self._arch.layers}
        for window, rope in kinds:
            members = np.array([index for index, shape in enumerate(self._arch.layers) if (shape.window, shape.rope) == (window, rope)])
            plan, first = plans[window], int(members[0])
            turned = self._rotation(first, rows, plan.slots, rope, angles, kv)
            program.fill(self._template, members * _CALLS + _ROTATION, turned, row_kernels.ROTATION_CHANGING)
            for wave in range(_MOST_WAVES):
                places = members * _CALLS + _ATTENTION + wave
                if wave < len(plan.waves):
                    program.fill(self._template, places, self._wave(first, rows, plan, wave, kv), attention.CHANGING)
                else:
                    self._template[places, 1] = 0
        self._table[:] = self._template  # counters of handed-out work begin at 0 again

    def _layer(self, index: int, kv: KVPool) -> NDArray[np.int64]:
        """int64 [_CALLS, WIDTH]: what does not change."""
        from kernels.native.program import WIDTH

        table = np.zeros((_CALLS, WIDTH), np.int64)
        for place, call in self._products_and_norms(self._weights.layers[index], MOST_ROWS):
            table[place] = call.row()
        some = torch.zeros(MOST_ROWS, dtype=torch.int64)
        table[_ROTATION] = self._rotation(index, MOST_ROWS, some, None, {}, kv).row()
        nothing = np.zeros((0, 6), np.int64)
        empty = NativePlan(some, np.zeros((1, 1), np.int32), np.zeros(1, np.int32), nothing, nothing, (nothing,), torch.empty(0), 0)
        table[_ATTENTION : _ATTENTION + _MOST_WAVES] = self._wave(index, MOST_ROWS, empty, 0, kv).row()
        return table

    def _products_and_norms(self, layer: LayerWeights, rows: int) -> list[tuple[int, Call]]:
        from kernels.native import rows as row_kernels

        hidden, normed, eps = self._hidden[:rows], self._normed[:rows], self._arch.norm_eps
        assert layer.attention_norm is not None
        assert layer.mlp_norm is not None
        attended, gated = self._attended[:rows].flatten(1), self._gated[:rows]
        return [
            (_NORM, row_kernels.norm_call(hidden, layer.attention_norm, normed, eps)),
            (_QKV, _product(normed, layer.qkv, self._qkv[:rows])),
            (_OUT, _product(attended, layer.attention_out, hidden, residual=hidden)),
            (_MLP_NORM, row_kernels.norm_call(hidden, layer.mlp_norm, normed, eps)),
            (_GATED, _product(normed, layer.gate_up, gated, activation=self._arch.activation)),
            (_DOWN, _product(gated[:, : layer.down.weight.shape[1]], layer.down, hidden, residual=hidden)),
        ]

    def _rotation(self, index: int, rows: int, slots: torch.Tensor, rope: str | None, angles: Angles, kv: KVPool) -> Call:
        from kernels.native.rows import rotation_call

        cos, sin = (None, None) if rope is None else angles[rope]
        qkv = self._qkv[:rows, : self._columns]
        return rotation_call(qkv, cos, sin, slots, kv.keys[index], kv.values[index], num_heads=self._arch.num_heads)

    def _wave(self, index: int, rows: int, plan: NativePlan, wave: int, kv: KVPool) -> Call:
        from kernels.native.attention import call

        arch = self._arch
        q = self._qkv[:rows, : arch.num_heads * arch.head_dim].unflatten(1, (arch.num_heads, arch.head_dim))
        soft_cap = arch.attention_soft_cap
        return call(q, self._attended[:rows], kv.keys[index], kv.values[index], plan, plan.waves[wave], arch.attention_scale, soft_cap)


def _product(x: torch.Tensor, weight: Packed, out: torch.Tensor, *, residual: torch.Tensor | None = None, activation: str = "") -> Call:
    from kernels.native import linear

    panels = cast("PackedLinear", weight)
    return linear.call(x, panels.weight, out, panels.bias, residual, panels.scales, activation)


def _fits(layer: LayerWeights, hidden: int) -> bool:
    """Plain norms before attention and MLP, none elsewhere, and products in panels whose outputs can be added to the residual in place."""
    norms = (layer.attention_norm, layer.mlp_norm)
    others = (layer.q_norm, layer.k_norm, layer.attention_post_norm, layer.mlp_post_norm)
    if any(norm is None or not native.takes_norm(norm[None], norm) for norm in norms) or any(norm is not None for norm in others):
        return False
    layouts = [getattr(product, "layout", "") for product in (layer.qkv, layer.attention_out, layer.down, layer.gate_up)]
    if layouts != ["panels", "panels", "panels", "gated panels"]:
        return False
    return all(product.weight.shape[0] * product.weight.shape[2] == hidden for product in (layer.attention_out, layer.down))
