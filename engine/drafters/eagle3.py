"""EAGLE-3 (arXiv 2503.01840): one transformer layer over the target's low, middle and high features, drafting token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import kernels
from engine.checkpoints.drafters.check import check_target, check_tensors, eagle_shapes
from engine.checkpoints.drafters.formats import eagle_spec
from engine.drafters.parts.feature_chain import FeatureChain
from engine.drafters.parts.frozen import vocabulary
from engine.drafters.parts.layers import Weights, attention_inputs, finish_layer, read_rope, take_layer
from engine.drafters.parts.private_kv import PrivateCache

if TYPE_CHECKING:
    from engine.batch import ForwardBatch
    from engine.checkpoints.drafters.folder import DrafterFolder
    from engine.checkpoints.drafters.specs import EagleSpec
    from engine.drafters.base import Host
    from engine.kv_pool import KVPool


class Eagle3Core:
    """The pass of an EAGLE-3 head; see `FeatureCore`."""

    def __init__(self, spec: EagleSpec, weights: Weights, host: Host) -> None:
        self.taps = spec.taps
        self.width = spec.layers.hidden_size
        self._spec = spec
        self._eps = spec.layers.norm_eps
        self._fc = weights.linear("fc")
        self._fc_norm = weights.maybe("input_norm.weight")
        self._norm = weights.take("norm.weight")
        prefixes = [f"{spec.prefix}." if spec.prefix else f"layers.{index}." for index in range(spec.layers.num_layers)]
        self._layers = [take_layer(weights, spec.layers, prefix) for prefix in prefixes]
        self._rope = read_rope(spec.layers, weights.device)
        self.vocabulary = vocabulary(weights, host.target.frozen())
        layers = spec.layers
        self.cache = PrivateCache(
            layers.num_layers, host.num_blocks, host.block_size, layers.num_kv_heads, layers.head_dim, weights.dtype, weights.device
        )

    def feature(self, taps: list[torch.Tensor]) -> torch.Tensor:
        joined = torch.cat(taps, dim=-1)
        if self._fc_norm is not None:
            joined = kernels.rms_norm(joined, self._fc_norm, self._eps)
        return kernels.linear(joined, self._fc)

    def forward(self, features: torch.Tensor, batch: ForwardBatch, kv: KVPool) -> torch.Tensor:
        layers = self._spec.layers
        plan = kernels.plan_attention(
            batch.block_tables, batch.query_start, batch.kv_lengths, batch.slots, cache=kv.keys[0], num_heads=layers.num_heads
        )
        embedded = self.vocabulary.embed(batch.token_ids)
        angles = self._rope.angles(batch.positions, features.dtype)
        hidden = features
        for index, layer in enumerate(self._layers):
            x = hidden if layer.hidden_norm is not None else kernels.rms_norm(hidden, layer.input_norm, self._eps)
            if layer.hidden_norm is not None:
                x = kernels.rms_norm(hidden, layer.hidden_norm, self._eps)
                hidden = x if self._spec.norm_before_residual else hidden
                x = torch.cat((kernels.rms_norm(embedded, layer.input_norm, self._eps), x), dim=-1)
            q, k, v = attention_inputs(layer, layers, x, angles)
            kernels.kv_write(k, v, kv.keys[index], kv.values[index], plan)
            attended = kernels.attention(q, kv.keys[index], kv.values[index], plan, layers.attention_scale)
            hidden = finish_layer(layer, layers, attended.view(len(hidden), -1), hidden)
        return hidden

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return self.vocabulary.head(kernels.rms_norm(features, self._norm, self._eps))


class Eagle3Drafter(FeatureChain):
    """Costs one small pass a draft."""

    @classmethod
    def load(cls, folder: DrafterFolder, host: Host) -> Eagle3Drafter:
        """Raises DrafterError where the folder's tensors, its config and the target do not go together."""
        target = host.target.spec
        spec = eagle_spec(folder.config, target.num_layers)
        check_target(spec.needs, spec.taps, target)
        tensors = folder.tensors()
        check_tensors(tensors, *eagle_shapes(spec), spec.format)
        core = Eagle3Core(spec, Weights(tensors, target.dtype, target.device), host)
        return cls(folder.name, core, host, core.vocabulary.target_ids)
