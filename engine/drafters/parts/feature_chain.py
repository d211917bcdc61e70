"""Drafting from the target's features: token x(p+1) and the feature of position p guess x(p+2), and so on with own features.

EAGLE-3 and MTP heads differ in the pass itself (`FeatureCore`). Features lie in the same block layout as the target's KV cache, so that
shared prefixes are shared; the head's own keys and values cannot be, since those of a position also depend on the token after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from engine.drafters.parts.chain import POSITIONS, draft_chain, draftable, make_draws, pieces
from engine.drafters.parts.confidence import ConfidenceBins
from engine.drafters.parts.draws import PLAIN
from engine.drafters.parts.private_kv import PrivateCache
from engine.drafters.parts.spread import Drafted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.batch import ForwardBatch
    from engine.drafters.base import DraftBatch, Drafts, Host, Progress
    from engine.kv_pool import KVPool
    from engine.sequence import Sequence
    from kernels.reference.sequential_head import SequentialHead

    Ints = NDArray[np.int64]


class FeatureCore(Protocol):
    """The pass of one kind of head."""

    taps: tuple[int, ...]
    width: int
    """Of a feature."""
    cache: PrivateCache

    def feature(self, taps: list[torch.Tensor]) -> torch.Tensor:
        """[T, width] from the target's hidden states."""
        ...

    def forward(self, features: torch.Tensor, batch: ForwardBatch, kv: KVPool) -> torch.Tensor:
        """[T, width]: the features that the head itself makes of [T, width] features and the batch's tokens."""
        ...

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """float32 [S, draft vocab] of the head's own features [S, width]."""
        ...


class FeatureChain:
    """State of all sequences. token_ids: the target's token of each column of the head's logits, None where they are the same."""

    def __init__(self, core: FeatureCore, host: Host, token_ids: torch.Tensor | None) -> None:
        self._core = core
        self._host = host
        spec = host.target.spec
        self._device = spec.device
        self._features = torch.zeros(host.num_blocks * host.block_size, core.width, dtype=spec.dtype, device=spec.device)
        self._valid: dict[int, int] = {}
        """Positions of each sequence whose keys and values come from the target's features."""
        self.bins = ConfidenceBins(POSITIONS)
        self._head = PLAIN if token_ids is None else _over(token_ids)

    def observe(self, progress: Progress) -> None:
        rows = progress.rows()
        at = torch.from_numpy(rows).to(self._device)
        taps = [progress.taps[tap].index_select(0, at) for tap in self._core.taps]
        self._features.index_copy_(0, torch.from_numpy(progress.slots[rows]).to(self._device), self._core.feature(taps))

    def propose(self, batch: DraftBatch) -> Drafts:
        rows, width = draftable(batch, self._core.cache.reserve)
        sequences = [batch.sequences[row] for row in rows]
        if not sequences:
            return Drafted.nothing(len(batch.sequences))
        features = self._catch_up(sequences)
        draws = make_draws(batch, sequences, width, self._host)
        serials = [sequence.serial for sequence in sequences]
        starts = np.array([sequence.num_computed for sequence in sequences], np.int64)
        ones = np.ones(len(sequences), np.int64)

        def advance(tokens: torch.Tensor, column: int) -> torch.Tensor:
            nonlocal features
            step = self._core.cache.batch(serials, starts + column, tokens, ones)
            features = self._core.forward(features, step, self._core.cache.kv)
            return self._core.logits(features)

        tokens, confidences = draft_chain(self._core.logits(features), advance, draws, width, self._head)
        drafts, _ = Drafted(rows, batch.limits[rows], tokens, confidences).spread(len(batch.sequences), self.bins, draws)
        return drafts

    def forget(self, sequence: Sequence) -> None:
        self._valid.pop(sequence.serial, None)
        self._core.cache.release(sequence.serial)

    def _catch_up(self, sequences: list[Sequence]) -> torch.Tensor:
        """Reads what was confirmed since the last draft; returns the head's features [S, width] at each sequence's last position."""
        # What a preempted sequence lost it computes again, with the same features: never more than is computed now.
        starts = np.array([min(self._valid.get(s.serial, 0), s.num_computed - 1) for s in sequences], np.int64)
        counts = np.array([s.num_computed for s in sequences], np.int64) - starts
        last: list[torch.Tensor | None] = [None] * len(sequences)
        for rows, first, sizes in pieces(starts, counts):
            tokens, slots = [], []
            for row, start, size in zip(rows.tolist(), first.tolist(), sizes.tolist(), strict=True):
                sequence = sequences[row]
                tokens.append(sequence.tokens[start + 1 : start + 1 + size])
                slots.append(self._slots(sequence, start, size))
            given = torch.from_numpy(np.concatenate(tokens)).to(self._device)
            features = self._features.index_select(0, torch.from_numpy(np.concatenate(slots)).to(self._device))
            step = self._core.cache.batch([sequences[row].serial for row in rows], first, given, sizes)
            made = self._core.forward(features, step, self._core.cache.kv)
            for row, end in zip(rows.tolist(), np.cumsum(sizes).tolist(), strict=True):
                last[row] = made[end - 1]
        for sequence in sequences:
            self._valid[sequence.serial] = sequence.num_computed
        return torch.stack([feature for feature in last if feature is not None])

    def _slots(self, sequence: Sequence, start: int, count: int) -> Ints:
        positions = np.arange(start, start + count)
        size = self._host.block_size
        return np.array(sequence.blocks, np.int64)[positions // size] * size + positions % size


def _over(token_ids: torch.Tensor) -> SequentialHead:
    from kernels.reference.sequential_head import SequentialHead

    return SequentialHead("none", token_ids=token_ids)
