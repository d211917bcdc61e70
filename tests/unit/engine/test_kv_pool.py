"""Tensors of the KV cache: what is copied inside of it."""

from __future__ import annotations

import pytest
import torch

from engine.kv_pool import KVPool

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_slots_are_copied_in_all_layers_and_nothing_else_changes(dtype: torch.dtype) -> None:
    pool = KVPool(3, 5, 16, 2, 16, dtype, CPU)
    for part in (*pool.keys, *pool.values):
        part.copy_(torch.randn(part.shape))

    def rows(part: torch.Tensor) -> torch.Tensor:
        return part.float().transpose(1, 2).flatten(0, 1)  # by slot

    # What is written to is read as well: 33 moves on to 50, and is overwritten.
    sources, targets = torch.tensor([17, 18, 33, 17]), torch.tensor([33, 34, 50, 65])
    expected = [rows(part).clone() for part in (*pool.keys, *pool.values)]
    for before in expected:
        before[targets] = before[sources].clone()
    pool.copy(sources, targets)
    for part, after in zip((*pool.keys, *pool.values), expected, strict=True):
        assert torch.equal(rows(part), after)
