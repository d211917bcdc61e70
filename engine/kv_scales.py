"""The KV cache in the number format that was asked for; in eight bits, what its numbers are divided by, measured on the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.batch import ForwardBatch, TargetModel
from engine.kv_pool import KVPool
from engine.transfer import to_device

if TYPE_CHECKING:
    from engine.config import EngineConfig, Limits

_TOKENS = 256
_HEADROOM = 2.0
"""Texts reach further than the tokens that were looked at. e4m3 is a floating type: room above costs no precision below."""
_LARGEST = 448.0


def calibrate(model: TargetModel, kv: KVPool) -> None:
    """Sets the scales of an fp8 pool from the largest keys and values of each layer and head, over tokens from all of the vocabulary.

    Runs one forward in the model's own type, in a pool of its own. Numbers beyond twice what was seen saturate.
    """
    spec = model.spec
    count = min(_TOKENS, spec.max_positions)
    blocks = -(-count // kv.block_size)
    wide = KVPool(spec.num_layers, blocks + 1, kv.block_size, spec.num_kv_heads, spec.head_dim, spec.dtype, spec.device)
    positions = np.arange(count)
    table = np.arange(1, blocks + 1, dtype=np.int32)
    one = np.array([count], np.int32)
    batch = ForwardBatch(
        token_ids=to_device(np.linspace(0, spec.vocab_size - 1, count).astype(np.int64), spec.device),
        positions=to_device(positions, spec.device),
        slots=to_device(positions + kv.block_size, spec.device),
        block_tables=to_device(table[None], spec.device),
        query_start=to_device(np.array([0, count], np.int32), spec.device),
        kv_lengths=to_device(one, spec.device),
        logit_rows=to_device(positions[-1:], spec.device),
        max_query=count,
        max_kv=count,
    )
    model.forward(batch, wide)
    for caches, scales in ((wide.keys, kv.k_scales), (wide.values, kv.v_scales)):
        for cache, scale in zip(caches, scales, strict=True):
            assert scale is not None
            scale.copy_((cache.abs().amax((0, 2, 3)).float() * (_HEADROOM / _LARGEST)).clamp(min=1e-6))


def make_pool(model: TargetModel, config: EngineConfig, limits: Limits) -> KVPool:
    """The KV cache that `config` asks for. Raises ValueError where the model cannot use it."""
    spec = model.spec
    fp8 = config.kv_dtype == "fp8"
    if fp8 and not getattr(model, "reads_fp8", False):
        raise ValueError(f"kv_dtype fp8: {spec.name} runs on transformers' own modules, whose attention reads no scaled cache; use auto")
    dtype = torch.float8_e4m3fn if fp8 else spec.dtype
    kv = KVPool(spec.num_layers, limits.max_blocks, config.block_size, spec.num_kv_heads, spec.head_dim, dtype, spec.device)
    if fp8:
        calibrate(model, kv)
    return kv
