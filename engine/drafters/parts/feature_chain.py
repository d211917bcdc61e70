"""Drafting from the target's features: token x(p+1) and the feature of position p guess x(p+2), and so on with own features.

EAGLE-3 and MTP heads differ in the pass itself (`FeatureCore`). Features lie in the same block layout as the target's KV cache, so that
shared prefixes are shared; the head's own keys and values cannot be, since those of a position also depend on the token after it. Positions
whose features were not seen are left out: the head's cache holds those before and after them side by side, each turned to its own position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from engine.drafters.parts.chain import POSITIONS, draft_chain, draftable, make_draws, pieces
from engine.drafters.parts.confidence import ConfidenceBins
from engine.drafters.parts.draws import PLAIN
from engine.drafters.parts.places import recent_slots, slots_of
from engine.drafters.parts.private_kv import PrivateCache
from engine.drafters.parts.spread import Drafted
from engine.kv_pool import zeros
from engine.transfer import to_device

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
    """A drafter with such a head; it may rest (`Rests`). It costs a pass a draft, and reads the target's hidden states as they pass by.

    token_ids: the target's token of each column of the head's logits, None where they are the same.
    """

    def __init__(self, name: str, core: FeatureCore, host: Host, token_ids: torch.Tensor | None) -> None:
        self.name = name
        self.taps = tuple(sorted(set(core.taps)))
        self._core = core
        self._host = host
        spec = host.target.spec
        self._device = spec.device
        slots = host.num_blocks * host.block_size
        self._features = zeros((slots, core.width), spec.dtype, spec.device)
        self._known = np.zeros(slots, bool)
        self._held: dict[int, Ints] = {}
        """Positions of each sequence that the head's cache holds, from their features."""
        self._bins = ConfidenceBins(POSITIONS)
        self.prior = self._bins.prior
        self._head = PLAIN if token_ids is None else _over(token_ids)

    @torch.inference_mode()
    def observe(self, progress: Progress) -> None:
        rows = progress.rows()
        at = to_device(rows, self._device)
        taps = [progress.taps[tap].index_select(0, at) for tap in self._core.taps]
        slots = progress.slots[rows]
        self._features.index_copy_(0, to_device(slots, self._device), self._core.feature(taps))
        self._known[slots] = True

    def miss(self, progress: Progress) -> None:
        """See `Rests`. Their slots may have held what was seen of another text."""
        self._known[progress.slots[progress.rows()]] = False

    @torch.inference_mode()
    def copy(self, sources: Ints, targets: Ints) -> None:
        """See `Rests`."""
        self._known[targets] = self._known[sources]
        features = self._features.index_select(0, to_device(sources, self._device))
        self._features.index_copy_(0, to_device(targets, self._device), features)

    def follows(self, sequences: list[Sequence]) -> NDArray[np.bool_]:
        """See `Rests`."""
        return np.asarray(self._known[recent_slots(sequences, self._host.block_size)].all(axis=1))

    @torch.inference_mode()
    def propose(self, batch: DraftBatch) -> Drafts:
        rows, width = draftable(batch, self._core.cache.reserve)
        rows = rows[self._known[np.array([self._last_slot(batch.sequences[row]) for row in rows], np.int64)]]
        sequences = [batch.sequences[row] for row in rows]
        if not sequences:
            return Drafted.nothing(len(batch.sequences))
        features = self._catch_up(sequences)
        draws = make_draws(batch, sequences, width, self._host)
        serials = [sequence.serial for sequence in sequences]
        held = np.array([len(self._held[serial]) for serial in serials], np.int64)
        starts = np.array([sequence.num_computed for sequence in sequences], np.int64)
        ones = np.ones(len(sequences), np.int64)

        def advance(tokens: torch.Tensor, column: int) -> torch.Tensor:
            nonlocal features
            step = self._core.cache.batch(serials, held + column, tokens, ones, starts + column)
            features = self._core.forward(features, step, self._core.cache.kv)
            return self._core.logits(features)

        tokens, confidences = draft_chain(self._core.logits(features), advance, draws, width, self._head)
        drafts, _ = Drafted(rows, batch.limits[rows], tokens, confidences).spread(len(batch.sequences), self._bins, draws)
        return drafts

    def finish(self, sequence: Sequence, *, complete: bool) -> None:  # noqa: ARG002 - nothing is learned here
        self._held.pop(sequence.serial, None)
        self._core.cache.release(sequence.serial)

    def _last_slot(self, sequence: Sequence) -> int:
        """Where the feature lies that the first draft comes from."""
        block, offset = divmod(sequence.num_computed - 1, self._host.block_size)
        return sequence.blocks[block] * self._host.block_size + offset

    def _catch_up(self, sequences: list[Sequence]) -> torch.Tensor:
        """Reads what was confirmed since the last draft; returns the head's features [S, width] at each sequence's last position."""
        held, fresh = zip(*(self._unread(sequence) for sequence in sequences), strict=True)
        starts, counts = (np.array([len(positions) for positions in part], np.int64) for part in (held, fresh))
        last: list[torch.Tensor | None] = [None] * len(sequences)
        for rows, first, sizes in pieces(starts, counts):
            tokens, slots, places = [], [], []
            for row, start, size in zip(rows.tolist(), (first - starts[rows]).tolist(), sizes.tolist(), strict=True):
                positions = fresh[row][start : start + size]
                tokens.append(sequences[row].tokens[positions + 1])
                slots.append(slots_of(sequences[row], positions, self._host.block_size))
                places.append(positions)
            given = torch.from_numpy(np.concatenate(tokens)).to(self._device)
            features = self._features.index_select(0, torch.from_numpy(np.concatenate(slots)).to(self._device))
            step = self._core.cache.batch([sequences[row].serial for row in rows], first, given, sizes, np.concatenate(places))
            made = self._core.forward(features, step, self._core.cache.kv)
            for row, end in zip(rows.tolist(), np.cumsum(sizes).tolist(), strict=True):
                last[row] = made[end - 1]
        for sequence, before, after in zip(sequences, held, fresh, strict=True):
            self._held[sequence.serial] = np.concatenate((before, after))
        return torch.stack([feature for feature in last if feature is not None])

    def _unread(self, sequence: Sequence) -> tuple[Ints, Ints]:
        """Positions that the head's cache holds, without the last that is computed, whose feature is always made anew; those to be read."""
        held = self._held.get(sequence.serial, np.zeros(0, np.int64))
        # What a preempted sequence lost it computes again, with the same features: never more is held than is computed now.
        held = held[: np.searchsorted(held, sequence.num_computed - 1)]
        after = np.arange(held[-1] + 1 if len(held) else 0, sequence.num_computed)
        return held, after[self._known[slots_of(sequence, after, self._host.block_size)]]


def _over(token_ids: torch.Tensor) -> SequentialHead:
    from kernels.reference.sequential_head import SequentialHead

    return SequentialHead("none", token_ids=token_ids)
