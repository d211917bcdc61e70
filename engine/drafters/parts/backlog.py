"""Hidden states that a drafter was shown and has not worked through: few at a time that costs as long as hundreds do at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


class Backlog:
    """In order of their coming."""

    def __init__(self) -> None:
        self._parts: list[tuple[list[torch.Tensor], Ints, Ints]] = []
        self._count = 0

    def __len__(self) -> int:
        """Tokens."""
        return self._count

    def add(self, taps: list[torch.Tensor], positions: Ints, slots: Ints) -> None:
        """taps: [T, hidden] each, which nobody writes to any more; positions, slots: int64 [T], see `Progress`."""
        self._parts.append((taps, positions, slots))
        self._count += len(slots)

    def take(self) -> tuple[list[torch.Tensor], Ints, Ints]:
        """All of it, of tokens that lay in one slot after the other only the last. There must be some; nothing is left."""
        parts, self._parts, self._count = self._parts, [], 0
        taps = [torch.cat(tap) for tap in zip(*(part[0] for part in parts), strict=True)]
        positions, slots = np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])
        _, last = np.unique(slots[::-1], return_index=True)
        if len(last) == len(slots):
            return taps, positions, slots
        kept = np.sort(len(slots) - 1 - last)
        at = torch.from_numpy(kept).to(taps[0].device)
        return [tap.index_select(0, at) for tap in taps], positions[kept], slots[kept]
