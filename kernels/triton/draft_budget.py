"""Draft budgets on the device: every candidate counts who goes before it, so nothing is sorted and nothing read back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_CANDIDATES = 1 << 13
"""Requests x drafts of a step; the ranking is quadratic and one program adds up the ranked survivals."""
_BLOCK = 64


@triton.jit
def _rank(survival, ranks, ordered, total, BLOCK: tl.constexpr, STEP: tl.constexpr):
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(survival + mine, mask=mine < total, other=-1.0)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, total, STEP):
        others = start + tl.arange(0, STEP)
        theirs = tl.load(survival + others, mask=others < total, other=-1.0)
        ahead = (theirs[None, :] > own[:, None]) | ((theirs[None, :] == own[:, None]) & (others[None, :] < mine[:, None]))
        before += tl.sum((ahead & (others < total)[None, :]).to(tl.int32), axis=1)
    tl.store(ranks + mine, before, mask=mine < total)
    tl.store(ordered + before, own, mask=mine < total)


@triton.jit
def _choose(ordered, capacity, decoding, extra, chosen, total, requests, covered, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    values = tl.load(ordered + index, mask=index < total, other=0.0).to(tl.float64)
    alive = tl.sum((values > 0.0).to(tl.int64), axis=0)
    if EARLY:
        taken = tl.minimum(alive, covered)
        gained = tl.cumsum(values, axis=0)
        base = tl.load(decoding)
        with_it = (requests + gained) / _at_least(base + tl.load(extra + index + 1, mask=index < taken, other=0.0))
        without = (requests + gained - values) / _at_least(base + tl.load(extra + index, mask=index < taken, other=0.0))
        stops = (index < taken) & (with_it <= without)
        count = tl.minimum(tl.min(tl.where(stops, index, BLOCK), axis=0).to(tl.int64), taken)
    else:
        count = tl.minimum(tl.maximum(tl.load(capacity), 0), alive)
    tl.store(chosen, count)


@triton.jit
def _at_least(seconds):
    return tl.maximum(seconds, 1e-12)


@triton.jit
def _lengths(ranks, chosen, lengths, drafts, BLOCK: tl.constexpr):
    request = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    rank = tl.load(ranks + request * drafts + index, mask=index < drafts, other=2147483647)
    tl.store(lengths + request, tl.sum((rank < tl.load(chosen)).to(tl.int64), axis=0))


def allocate_top(survival: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
    """As `kernels.reference.draft_budget.allocate_top`. Raises ValueError for more than 8,192 candidates."""
    return _allocate(survival, capacity, None, None)


def allocate_early_stop(survival: torch.Tensor, decoding: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
    """As `kernels.reference.draft_budget.allocate_early_stop`. Raises ValueError for more than 8,192 candidates."""
    return _allocate(survival, None, decoding, extra)


def _allocate(
    survival: torch.Tensor, capacity: torch.Tensor | None, decoding: torch.Tensor | None, extra: torch.Tensor | None
) -> torch.Tensor:
    requests, drafts = survival.shape
    total = requests * drafts
    if total > MAX_CANDIDATES:
        raise ValueError(f"at most {MAX_CANDIDATES} candidates are ranked on the device, got {requests} x {drafts}")
    if survival.dtype != torch.float32 or (extra is not None and extra.dtype != torch.float64):
        raise ValueError(f"survival must be float32 and seconds float64, got {survival.dtype}{'' if extra is None else f', {extra.dtype}'}")
    survival = survival.contiguous()
    if total == 0:
        return torch.zeros(requests, dtype=torch.int64, device=survival.device)
    lengths = torch.empty(requests, dtype=torch.int64, device=survival.device)
    ranks = torch.empty(total, dtype=torch.int32, device=survival.device)
    ordered = torch.empty(total, dtype=torch.float32, device=survival.device)
    chosen = torch.empty(1, dtype=torch.int64, device=survival.device)
    _rank[(triton.cdiv(total, _BLOCK),)](survival, ranks, ordered, total, BLOCK=_BLOCK, STEP=128)
    _choose[(1,)](
        ordered, chosen if capacity is None else capacity, ordered if decoding is None else decoding, ordered if extra is None else extra,
        chosen, total, requests, 0 if extra is None else len(extra) - 1, EARLY=extra is not None, BLOCK=triton.next_power_of_2(total),
        num_warps=8,
    )  # fmt: skip
    _lengths[(requests,)](ranks, chosen, lengths, drafts, BLOCK=triton.next_power_of_2(drafts), num_warps=1)
    return lengths
