"""What an engine's configuration comes to: blocks within the budget, drafters' share included, and the room to grow."""

from __future__ import annotations

import pytest
import torch

from engine.batch import ModelSpec
from engine.config import EngineConfig, derive_limits

GIB = 1 << 30


def spec(device: str = "cpu") -> ModelSpec:
    """30 layers of 3 heads of 64 numbers: a block of 16 tokens has 12 KiB of keys and as many of values in each."""
    return ModelSpec(
        name="m", revision="1", num_layers=30, num_kv_heads=3, head_dim=64, hidden_size=576, vocab_size=49152, max_positions=8192,
        eos_token_ids=(0,), dtype=torch.float32, device=torch.device(device), parameter_bytes=0,
    )  # fmt: skip


@pytest.mark.parametrize("kv_bytes", [16 << 20, GIB, 4 * GIB, 64 * GIB])
@pytest.mark.parametrize("drafter_bytes", [0, 3072])
def test_blocks_and_what_drafters_keep_for_them_fit_the_budget(kv_bytes: int, drafter_bytes: int) -> None:
    limits = derive_limits(EngineConfig(kv_bytes=kv_bytes), spec(), 0, drafter_bytes)
    assert limits.block_bytes == 16 * (2 * 30 * 3 * 64 * 4 + drafter_bytes)
    assert limits.num_blocks * limits.block_bytes <= kv_bytes
    assert limits.num_blocks <= limits.max_blocks
    assert limits.max_blocks * (limits.block_bytes - 16 * drafter_bytes) <= kv_bytes
    useful = limits.num_blocks == 64 * 512 + 1
    assert useful or (limits.num_blocks + 1) * limits.block_bytes > kv_bytes


@pytest.mark.parametrize(("kv_bytes", "grows"), [(16 << 20, True), (GIB, False), (4 * GIB, True)])
def test_a_cache_is_laid_out_for_more_only_where_that_takes_no_pages_yet(kv_bytes: int, grows: bool) -> None:
    """Of 1 GiB a drafter's share is 1.1 MB a layer: in pages of 2 MiB all of it would be taken along with what is used."""
    limits = derive_limits(EngineConfig(kv_bytes=kv_bytes), spec(), 0, 3072)
    assert (limits.max_blocks > limits.num_blocks) == grows
    on_gpu = derive_limits(EngineConfig(kv_bytes=kv_bytes), spec("cuda"), 0, 3072)
    assert on_gpu.max_blocks == on_gpu.num_blocks
