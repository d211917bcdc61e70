"""Paged variable-length attention against a float64 definition, on odd shapes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import kernels
from tests.unit.kernels.naive import naive_attention


@dataclass(frozen=True)
class Case:
    query_lengths: list[int]
    kv_lengths: list[int]
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    soft_cap: float | None = None
    shared_blocks: int = 0


CASES = {
    "prefill, drafts and decoding in one step": Case([1, 5, 17, 129, 1, 2], [40, 5, 33, 160, 1, 300]),
    "decoding only": Case([1] * 7, [1, 2, 15, 16, 17, 31, 200]),
    "many sequences": Case([1, 2] * 20, [2 + 7 * number for number in range(40)]),
    "drafts of two and three": Case([2, 3, 3, 2], [2, 64, 65, 130]),
    "drafts of nine": Case([9] * 5, [9, 20, 100, 150, 151]),
    "one head a key head": Case([1, 4, 20], [9, 30, 20], heads=4, kv_heads=4, head_dim=40),
    "eight heads on one key head": Case([1, 4, 20], [9, 30, 20], heads=8, kv_heads=1, head_dim=16),
    "block size 1": Case([1, 6], [9, 30], block_size=1),
    "window": Case([1, 5, 17, 40, 1], [90, 33, 60, 40, 3], window=7),
    "window of one": Case([1, 5], [90, 33], window=1),
    "soft cap": Case([1, 2, 17], [90, 33, 60], soft_cap=1.5),
    "window and soft cap": Case([1, 2, 17], [90, 33, 60], window=20, soft_cap=1.5),
    "shared prefix": Case([1, 1, 3, 9, 30], [200, 170, 210, 190, 192], shared_blocks=10),
    "shared prefix, decoding": Case([1] * 14, [170, 210, 190, 180, 500, 161, 162] * 2, shared_blocks=10),
    "shared prefix and window": Case([1, 1, 9], [200, 170, 190], shared_blocks=10, window=50),
    "shared prefix and soft cap": Case([1, 1, 9, 2], [200, 170, 190, 163], shared_blocks=10, soft_cap=1.5),
}


def run(case: Case, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(found, expected); checks on the way that a shared prefix is read as one.

    Blocks are scattered, never-written ones hold poison, shared blocks are one and the same.
    """
    generator = np.random.default_rng(7)
    torch.manual_seed(7)
    count, width = len(case.kv_lengths), -(-max(case.kv_lengths) // case.block_size)
    tables = generator.permutation(np.arange(1, 1 + count * width)).reshape(count, width)
    tables[:, : case.shared_blocks] = tables[0, : case.shared_blocks]
    num_blocks = count * width + 2
    shape = (num_blocks, case.kv_heads, case.block_size, case.head_dim)
    k_cache, v_cache = torch.full(shape, 1e4, dtype=dtype), torch.full(shape, 1e4, dtype=dtype)
    keys, values = [], []
    prefix = torch.randn(2, case.shared_blocks * case.block_size, case.kv_heads, case.head_dim)
    for table, length in zip(tables, case.kv_lengths, strict=True):
        pair = torch.cat((prefix, torch.randn(2, length - prefix.shape[1], case.kv_heads, case.head_dim)), dim=1).to(dtype)
        for position in range(length):
            block, offset = table[position // case.block_size], position % case.block_size
            k_cache[block, :, offset], v_cache[block, :, offset] = pair[0, position], pair[1, position]
        keys.append(pair[0])
        values.append(pair[1])
    q = (torch.randn(sum(case.query_lengths), case.heads, case.head_dim) * 2).to(dtype)
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(case.kv_lengths, case.query_lengths, strict=True)])
    owners = np.repeat(np.arange(count), case.query_lengths)
    slots = tables[owners, positions // case.block_size] * case.block_size + positions % case.block_size
    plan = kernels.plan_attention(
        torch.from_numpy(tables.astype(np.int32)),
        torch.from_numpy(np.concatenate([[0], np.cumsum(case.query_lengths)]).astype(np.int32)),
        torch.tensor(case.kv_lengths, dtype=torch.int32),
        torch.from_numpy(slots),
        cache=k_cache,
        num_heads=case.heads,
        window=case.window,
    )
    assert len(plan.shared) == (case.shared_blocks > 0 and case.window is None)
    scale = case.head_dim**-0.5
    found = kernels.attention(q, k_cache, v_cache, plan, scale, case.soft_cap)
    return found, naive_attention(q, keys, values, case.query_lengths, scale, case.window, case.soft_cap)


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_the_definition(name: str) -> None:
    found, expected = run(CASES[name])
    assert found.is_contiguous()
    assert (found.double() - expected).abs().max() < 5e-6


@pytest.mark.parametrize("name", ["prefill, drafts and decoding in one step", "window and soft cap", "shared prefix"])
def test_bfloat16_is_as_close_as_its_rounding(name: str) -> None:
    found, expected = run(CASES[name], torch.bfloat16)
    assert (found.double() - expected).abs().max() < 3e-2


def test_a_plan_serves_many_layers() -> None:
    """Scratch space inside a plan carries nothing from one layer to the next, not even infinities."""
    tables, slots = torch.tensor([[1], [2]], dtype=torch.int32), torch.tensor([18, 33])
    starts, lengths = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([3, 2], dtype=torch.int32)
    wild, calm = torch.full((3, 2, 16, 8), 1e30), torch.randn(3, 2, 16, 8)
    q = torch.randn(2, 4, 8)

    def plan() -> object:
        return kernels.plan_attention(tables, starts, lengths, slots, cache=calm, num_heads=4)

    used, fresh = plan(), plan()
    kernels.attention(q * 1e30, wild, wild, used, 1.0)
    assert torch.equal(kernels.attention(q, calm, calm, used, 0.3), kernels.attention(q, calm, calm, fresh, 0.3))


def test_heads_that_do_not_divide_are_refused() -> None:
    cache = torch.zeros(2, 3, 4, 8)
    one = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key heads"):
        kernels.plan_attention(one[None], one, one[1:], torch.tensor([4]), cache=cache, num_heads=4)


def test_keys_and_values_land_in_their_slots_and_nowhere_else() -> None:
    k_cache, v_cache = torch.zeros(4, 2, 3, 5), torch.zeros(4, 2, 3, 5)
    tables, starts = torch.tensor([[2, 1], [3, 0]], dtype=torch.int32), torch.tensor([0, 2, 3], dtype=torch.int32)
    slots = torch.tensor([2 * 3 + 2, 1 * 3 + 0, 3 * 3 + 1])
    plan = kernels.plan_attention(tables, starts, torch.tensor([4, 2], dtype=torch.int32), slots, cache=k_cache, num_heads=2)
    k, v = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    kernels.kv_write(k, v, k_cache, v_cache, plan)
    for row, (block, offset) in enumerate([(2, 2), (1, 0), (3, 1)]):
        assert torch.equal(k_cache[block, :, offset], k[row])
        assert torch.equal(v_cache[block, :, offset], v[row])
    assert k_cache.count_nonzero() == k.numel()
    assert v_cache.count_nonzero() == v.numel()


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("causal", [False, True])
def test_draft_blocks_over_a_cache_in_another_order(causal: bool, window: int | None) -> None:
    """Drafters keep the tokens of all heads side by side, and the rows of a block see each other, later ones too."""
    torch.manual_seed(0)
    slots, heads, kv_heads, dim, size = (4, 3), 6, 2, 8, 4
    lengths = [14, 7]
    k, v = torch.randn(2, 40, kv_heads, dim)
    pages = [cache.unflatten(0, (-1, size)).transpose(1, 2) for cache in (k, v)]
    tables = torch.tensor([[7, 2, 9, 1], [4, 5, 0, 0]], dtype=torch.int32)
    start = torch.tensor([0, slots[0], sum(slots)], dtype=torch.int32)
    q = torch.randn(sum(slots), heads, dim)
    rows = torch.zeros(sum(slots), dtype=torch.int64)
    plan = kernels.plan_attention(
        tables, start, torch.tensor(lengths, dtype=torch.int32), rows, cache=pages[0], num_heads=heads, window=window, causal=causal
    )
    found = kernels.attention(q, *pages, plan, 0.3)
    texts = [
        [cache[tables[s].long()[torch.arange(n) // size] * size + torch.arange(n) % size] for s, n in enumerate(lengths)]
        for cache in (k, v)
    ]
    if causal:
        assert (found - naive_attention(q, *texts, list(slots), 0.3, window, None)).abs().max() < 1e-5
        return
    row = 0
    for keys, values, count, length in zip(*texts, slots, lengths, strict=True):
        for index in range(count):  # as if it were the last row, with what its window shows from its own place on
            first = 0 if window is None else max(0, length - count + index - window + 1)
            expected = naive_attention(q[row : row + 1], [keys[first:]], [values[first:]], [1], 0.3, None, None)
            assert (found[row] - expected[0]).abs().max() < 1e-5
            row += 1
