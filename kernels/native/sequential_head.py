"""The sequential head where it drafts the likeliest token: the logits are added while the bias is made, and looked through twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import native
from kernels.native.jit import lanes
from kernels.native.rows import log_sums, peaks
from kernels.reference.linear import linear
from kernels.reference.sequential_head import check_block, draft

if TYPE_CHECKING:
    from kernels.reference.sequential_head import DraftBlock, SequentialHead


def takes(logits: torch.Tensor, head: SequentialHead) -> bool:
    """Whether a block of logits [S, K, V_d] can be drafted here: float32, rows of whole vectors, and w2 packed."""
    fits = logits.dim() == 3 and native.takes_rows(logits.flatten(0, 1)) and logits.shape[2] % lanes() == 0
    return fits and head.packed_w2 is not None and head.w1 is not None and head.w1.dtype == torch.float32


def sequential_head(logits: torch.Tensor, hidden: torch.Tensor | None, anchors: torch.Tensor, head: SequentialHead) -> DraftBlock:
    """`kernels.reference.sequential_head` of greedy rows, without the weights."""
    check_block(logits, hidden, head, None, None)
    packed = head.packed_w2
    assert packed is not None

    def choose(k: int, embedding: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert embedding is not None
        weights = linear(embedding, packed, logits[:, k])
        highest, columns = peaks(weights)
        return columns, highest, log_sums(weights, highest)

    return draft(logits.shape[1], hidden, anchors, head, choose)
