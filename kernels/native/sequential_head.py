"""The sequential head where it drafts the likeliest token: the logits are added while the bias is made, and looked through twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import native
from kernels.native.jit import lanes
from kernels.native.rows import log_sums, peaks
from kernels.reference.linear import linear
from kernels.reference.sequential_head import DraftBlock, check_block, mix

if TYPE_CHECKING:
    from kernels.reference.sequential_head import SequentialHead


def takes(logits: torch.Tensor, head: SequentialHead) -> bool:
    """Whether a block of logits [S, K, V_d] can be drafted here: float32, rows of whole vectors, and w2 packed."""
    fits = logits.dim() == 3 and native.takes_rows(logits.flatten(0, 1)) and logits.shape[2] % lanes() == 0
    return fits and head.packed_w2 is not None and head.w1 is not None and head.w1.dtype == torch.float32


def sequential_head(logits: torch.Tensor, hidden: torch.Tensor | None, anchors: torch.Tensor, head: SequentialHead) -> DraftBlock:
    """`kernels.reference.sequential_head` of greedy rows, without the weights."""
    check_block(logits, hidden, head, None, None)
    packed, w1 = head.packed_w2, head.w1
    assert packed is not None
    assert w1 is not None
    state: torch.Tensor | None = torch.zeros(len(anchors), head.rank, dtype=w1.dtype)
    previous = anchors
    tokens, lses, levels = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    confidences: list[torch.Tensor] = []
    for k in range(logits.shape[1]):
        embedding, state, confidence = mix(head, previous, state, None if hidden is None else hidden[:, k])
        assert embedding is not None
        weights = linear(embedding, packed, logits[:, k])
        highest, columns = peaks(weights)
        lse = log_sums(weights, highest)
        previous = columns if head.token_ids is None else head.token_ids[columns]
        tokens.append(previous)
        lses.append(lse)
        levels.append(highest - lse)
        if confidence is not None:
            confidences.append(confidence)
    sure = torch.stack(confidences, 1) if confidences else None
    return DraftBlock(torch.stack(tokens, 1), torch.stack(lses, 1), torch.stack(levels, 1), sure, None)
