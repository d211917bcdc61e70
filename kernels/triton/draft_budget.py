"""Draft budgets on the device: every candidate counts who goes before it, so nothing is sorted and nothing read back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_CANDIDATES = 1 << 13
"""Requests x drafts of a step; the ranking is quadratic."""


@triton.jit(do_not_specialize=["requests", "drafts"])
def _allocate(survival, capacity, lengths, requests, drafts, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """A program a request: each of its drafts is taken if fewer than `capacity` candidates go before it."""
    request = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    mine = request * drafts + place
    own = tl.load(survival + mine, mask=place < drafts, other=0.0)
    before = tl.zeros([BLOCK, STEP], tl.int32)
    total = requests * drafts
    for start in range(0, total, STEP):
        others = start + tl.arange(0, STEP)
        theirs = tl.load(survival + others, mask=others < total, other=-1.0)
        ahead = (theirs[None, :] > own[:, None]) | ((theirs[None, :] == own[:, None]) & (others[None, :] < mine[:, None]))
        before += ahead.to(tl.int32)
    taken = (own > 0.0) & (tl.sum(before, axis=1) < tl.load(capacity))
    tl.store(lengths + request, tl.sum(taken.to(tl.int64), axis=0))


def allocate_top(survival: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
    """As `kernels.reference.draft_budget.allocate_top`. Raises ValueError for more than 8,192 candidates."""
    requests, drafts = survival.shape
    if requests * drafts > MAX_CANDIDATES:
        raise ValueError(f"at most {MAX_CANDIDATES} candidates are ranked on the device, got {requests} x {drafts}")
    if survival.dtype != torch.float32 or capacity.dtype != torch.int64:
        raise ValueError(f"survival must be float32 and capacity int64, got {survival.dtype} and {capacity.dtype}")
    if requests * drafts == 0:
        return torch.zeros(requests, dtype=torch.int64, device=survival.device)
    lengths = torch.empty(requests, dtype=torch.int64, device=survival.device)
    _allocate[(requests,)](
        survival.contiguous(), capacity, lengths, requests, drafts, BLOCK=triton.next_power_of_2(drafts), STEP=256, num_warps=4
    )
    return lengths
