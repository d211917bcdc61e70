"""Sampling parameters of the running requests by slot, so that a step's logit rows are described without a loop over them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.noise import mix, sample_seed
from engine.speculation.verify import NO_DRAFT, Mode, Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.sequence import Sequence

    Ints = NDArray[np.int64]

_MASK = (1 << 64) - 1


class RowTable:
    """One entry a slot. Unseeded requests get a seed of their own from the run's `entropy` and their serial number."""

    def __init__(self, max_sequences: int, entropy: int) -> None:
        self._entropy = entropy & _MASK
        self._modes = np.zeros(max_sequences, np.int8)
        self._temperatures = np.ones(max_sequences, np.float32)
        self._top_ks = np.zeros(max_sequences, np.int64)
        self._top_ps = np.ones(max_sequences, np.float32)
        self._seeds = np.zeros(max_sequences, np.uint64)

    def enter(self, sequence: Sequence) -> None:
        """Takes down the parameters of a sequence that got a slot."""
        sampling, slot = sequence.request.sampling, sequence.slot
        self._modes[slot] = Mode.GREEDY if sampling.greedy else Mode.STOCHASTIC if sampling.seed is None else Mode.SEEDED
        self._temperatures[slot] = 1.0 if sampling.greedy else sampling.temperature
        self._top_ks[slot] = sampling.top_k
        self._top_ps[slot] = sampling.top_p
        if sampling.seed is None:
            own = np.array([(self._entropy + sequence.serial) & _MASK], np.uint64)
            self._seeds[slot] = mix(mix(own))[0]
        else:
            self._seeds[slot] = sample_seed(sampling.seed, sampling.sample)

    def seed(self, slot: int) -> int:
        """Of the noise of the sequence in a slot, as a signed number."""
        return int(self._seeds[slot : slot + 1].view(np.int64)[0])

    def rows(self, slots: Ints, first_positions: Ints, counts: Ints, drafts: list[Ints]) -> Rows:
        """Rows of the sequences in `slots` [S]: `counts[s]` of them for the s-th, which decide its generated tokens from
        `first_positions[s]` on. drafts: one array a sequence, of `counts[s] - 1` tokens.
        """
        owner = np.repeat(slots, counts)
        starts = np.cumsum(counts) - counts
        index = np.arange(len(owner)) - np.repeat(starts, counts)
        drafted = np.full(len(owner), NO_DRAFT, np.int64)
        if len(owner) > len(slots):
            drafted[index < np.repeat(counts - 1, counts)] = np.concatenate(drafts)
        return Rows(
            self._modes[owner],
            self._temperatures[owner],
            self._top_ks[owner],
            self._top_ps[owner],
            self._seeds[owner],
            np.repeat(first_positions, counts) + index,
            drafted,
        )
