"""Hidden states that a drafter was shown and has not worked through: few at a time that costs as long as hundreds do at once."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

    Part = tuple[list[torch.Tensor], Ints, Ints]

_TOGETHER = 256
"""Tokens beyond which no more are put together: hundreds at once cost no longer each than thousands, which would all be copied."""


_NOWHERE = 0
"""A slot of block 0, which belongs to nobody."""


class Backlog:
    """In order of their coming."""

    def __init__(self) -> None:
        self._parts: deque[Part] = deque()
        self._count = 0

    def __len__(self) -> int:
        """Tokens."""
        return self._count

    def add(self, taps: list[torch.Tensor], positions: Ints, slots: Ints) -> None:
        """taps: [T, hidden] each; positions, slots: int64 [T], see `Progress`. Nobody else writes to any of them any more."""
        self._parts.append((taps, positions, slots))
        self._count += len(slots)

    def copy(self, sources: Ints, targets: Ints) -> None:
        """What waits for slots `sources` waits for `targets`, too, instead of what waited for those before: int64 [N]."""
        parts = list(self._parts)
        found = [np.nonzero(slots[:, None] == sources) for _, _, slots in parts]
        for _, _, slots in parts:
            slots[np.isin(slots, targets)] = _NOWHERE
        for (taps, positions, _), (rows, which) in zip(parts, found, strict=True):
            if len(rows):
                at = to_device(rows, taps[0].device)
                self.add([tap.index_select(0, at) for tap in taps], positions[rows], targets[which])

    def take(self) -> Iterator[Part]:
        """All of it, some hundred tokens at a time; of tokens that lay in one slot after the other only the last."""
        parts, self._parts, self._count = self._parts, deque(), 0
        slots = np.concatenate([part[2] for part in parts]) if parts else np.zeros(0, np.int64)
        kept = np.zeros(len(slots), bool)
        kept[len(slots) - 1 - np.unique(slots[::-1], return_index=True)[1]] = True
        first = 0
        while parts:
            some = [parts.popleft()]
            count = len(some[0][1])
            while parts and count < _TOGETHER:
                some.append(parts.popleft())
                count += len(some[-1][1])
            rows = np.flatnonzero(kept[first : first + count])
            first += count
            if len(rows):
                yield _join(some, rows, count)


def _join(parts: list[Part], rows: Ints, count: int) -> Part:
    """`rows` of the `count` tokens of `parts`."""
    taps = [torch.cat(tap) if len(parts) > 1 else tap[0] for tap in zip(*(part[0] for part in parts), strict=True)]
    positions, slots = np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])
    if len(rows) == count:
        return taps, positions, slots
    at = to_device(rows, taps[0].device)
    return [tap.index_select(0, at) for tap in taps], positions[rows], slots[rows]
