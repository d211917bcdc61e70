"""A draft model reading along with many texts: it keeps KV for what it has read, and goes back to where a text took another turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.drafters.parts.chain import pieces
from engine.drafters.parts.private_kv import PrivateCache

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.batch import TargetModel

    Ints = NDArray[np.int64]


class Reader:
    """`reserve` comes before `read`."""

    def __init__(self, model: TargetModel, num_blocks: int, block_size: int) -> None:
        spec = model.spec
        self._model = model
        self._device = spec.device
        self.cache = PrivateCache(spec.num_layers, num_blocks, block_size, spec.num_kv_heads, spec.head_dim, spec.dtype, spec.device)
        self._read: dict[int, Ints] = {}
        self._ahead = 0
        """Tokens added since the last `read`, whose numbers are still on the device."""

    def reserve(self, serial: int, tokens: int) -> bool:
        """Makes room for a text of `tokens`; False where it would be too long for the model or the cache."""
        return tokens <= self._model.spec.max_positions and self.cache.reserve(serial, tokens)

    def read(self, serials: list[int], texts: list[Ints]) -> torch.Tensor:
        """float32 [S, vocab]: what follows each text (int64 [length]). Only what is new since the last time is computed."""
        starts = np.array([self._known(serial, text) for serial, text in zip(serials, texts, strict=True)], np.int64)
        counts = np.array([len(text) for text in texts], np.int64) - starts
        last: list[torch.Tensor | None] = [None] * len(serials)
        for rows, first, sizes in pieces(starts, counts):
            spans = [
                texts[row][start : start + size] for row, start, size in zip(rows.tolist(), first.tolist(), sizes.tolist(), strict=True)
            ]
            tokens = torch.from_numpy(np.concatenate(spans)).to(self._device)
            logits = self._model.forward(self.cache.batch([serials[row] for row in rows], first, tokens, sizes), self.cache.kv).logits
            for place, row in enumerate(rows.tolist()):
                last[row] = logits[place]
        for serial, text in zip(serials, texts, strict=True):
            self._read[serial] = text.copy()
        return torch.stack([row for row in last if row is not None])

    def add(self, serials: list[int], tokens: torch.Tensor) -> torch.Tensor:
        """float32 [S, vocab]: what follows when each text goes on with one more token, int64 [S]. Name them later with `drafted`."""
        starts = np.array([len(self._read[serial]) for serial in serials], np.int64) + self._ahead
        self._ahead += 1
        ones = np.ones(len(serials), np.int64)
        return self._model.forward(self.cache.batch(serials, starts, tokens, ones), self.cache.kv).logits

    def drafted(self, serials: list[int], tokens: Ints) -> None:
        """The tokens that were added, int64 [S, K], now that they are known to the host."""
        for serial, row in zip(serials, tokens, strict=True):
            self._read[serial] = np.concatenate((self._read[serial], row))
        self._ahead = 0

    def forget(self, serial: int) -> None:
        self._read.pop(serial, None)
        self.cache.release(serial)

    def _known(self, serial: int, text: Ints) -> int:
        """Leading tokens whose KV is there; the last token is always read again, for its logits."""
        read = self._read.get(serial)
        if read is None:
            return 0
        length = min(len(read), len(text) - 1)
        same = read[:length] == text[:length]
        return length if same.all() else int(same.argmin())
