"""The drafts of one step, and what is known of them. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from engine.drafters.base import Drafts

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]


@dataclass(slots=True)
class Proposal:
    """Drafts of S sequences. `token_ids` [S, D] and `bins` [S, D] hold `drafted[s]` drafts; the first `chosen[s]` are to be verified.

    `survival`: float64 [S, D], the chance that drafts 0..j all stand. `nanoseconds`: int64 [S]. `groups`: (drafter name, rows of its
    sequences). `passes`: (drafter, requests that it was asked for, nanoseconds). `probabilities`: (rows, [rows, D', vocab]) of random
    drafts. `shadows`: (drafter, rows, drafts) that were not taken, to be held against what the step confirms.
    """

    token_ids: Ints
    bins: Ints
    drafted: Ints
    chosen: Ints
    nanoseconds: Ints
    survival: Floats
    groups: list[tuple[str, Ints]] = field(default_factory=list)
    passes: list[tuple[str, int, int]] = field(default_factory=list)
    shadows: list[tuple[str, Ints, Drafts]] = field(default_factory=list)
    probabilities: list[tuple[Ints, torch.Tensor]] = field(default_factory=list)

    @staticmethod
    def empty(count: int) -> Proposal:
        nothing = np.zeros((count, 0), np.int64)
        drafted, chosen, nanoseconds = np.zeros((3, count), np.int64)
        return Proposal(nothing, nothing, drafted, chosen, nanoseconds, np.zeros((count, 0)))

    def tokens(self, row: int) -> Ints:
        """The drafts of one sequence that are to be verified."""
        return self.token_ids[row, : self.chosen[row]]
