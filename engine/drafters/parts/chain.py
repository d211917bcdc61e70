"""Drafting one token after the other: what EAGLE-3, MTP heads and independent draft models have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.drafters.parts.draws import PLAIN, Draws

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from engine.drafters.base import DraftBatch, Host
    from engine.sequence import Sequence
    from kernels.reference.sequential_head import SequentialHead

    Ints = NDArray[np.int64]

AT_ONCE = 2048
"""Tokens of a catching-up pass: a long prompt is read in pieces of about this many."""
POSITIONS = 16
"""Draft positions that the calibration tells apart."""


def draft_chain(
    logits: torch.Tensor, advance: Callable[[torch.Tensor, int], torch.Tensor], draws: Draws, width: int, head: SequentialHead = PLAIN
) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens int64 [S, width] and confidences float32 [S, width].

    logits: float32 [S, draft vocab] of the first draft. advance(tokens [S], column) gives those of the draft after draft `column`.
    The confidence is the chance of the draft distribution's likeliest token, which knows earlier drafts but not its own.
    """
    tokens: list[torch.Tensor] = []
    confidences: list[torch.Tensor] = []
    nothing = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    for column in range(width):
        block = draws.draw(logits[:, None], None, nothing, column, head)
        confidences.append(block.peak[:, 0].exp())
        tokens.append(block.tokens[:, 0])
        if column + 1 < width:
            logits = advance(tokens[-1], column)
    return torch.stack(tokens, 1), torch.stack(confidences, 1).float()


def draftable(batch: DraftBatch, reserve: Callable[[int, int], bool]) -> tuple[Ints, int]:
    """Rows of the batch that want drafts and have room for the longest, and that length. reserve: (serial, tokens) -> is there room."""
    width = int(batch.limits.max(initial=0))
    sequences = batch.sequences
    rows = [row for row in np.flatnonzero(batch.limits > 0).tolist() if reserve(sequences[row].serial, sequences[row].num_tokens + width)]
    return np.array(rows, np.int64), width


def make_draws(batch: DraftBatch, sequences: list[Sequence], width: int, host: Host) -> Draws:
    spec = host.target.spec
    return Draws(sequences, step=batch.step, entropy=host.entropy, width=width, vocab=spec.vocab_size, device=spec.device)


def pieces(starts: Ints, counts: Ints) -> list[tuple[Ints, Ints, Ints]]:
    """Cuts spans [S] of `counts` tokens from `starts` on into passes of about `AT_ONCE` tokens: (rows, starts, counts) each.

    The last pass of a row holds its last token; rows finish in the order in which passes are listed.
    """
    passes: list[tuple[list[int], list[int], list[int]]] = [([], [], [])]
    room = AT_ONCE
    for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        done = 0
        while done < count:
            if room <= 0:
                passes.append(([], [], []))
                room = AT_ONCE
            taken = min(count - done, room)
            for column, value in zip(passes[-1], (row, start + done, taken), strict=True):
                column.append(value)
            done += taken
            room -= taken
    return [(np.array(rows, np.int64), np.array(first, np.int64), np.array(sizes, np.int64)) for rows, first, sizes in passes if rows]
