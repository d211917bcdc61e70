"""A draft model's own paged KV cache: each sequence has its own blocks, nothing is shared, and rejected drafts are a shorter length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.batch import ForwardBatch
from engine.kv_blocks import BlockPool
from engine.kv_pool import KVPool

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


class PrivateCache:
    """`num_blocks` blocks of `block_size` tokens over `num_layers` layers. Sequences are named by their serial number."""

    def __init__(
        self, num_layers: int, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kv = KVPool(num_layers, num_blocks, block_size, kv_heads, head_dim, dtype, device)
        self._pool = BlockPool(num_blocks, block_size, share_prefixes=False)
        self._blocks: dict[int, list[int]] = {}
        self._device = device

    def reserve(self, serial: int, tokens: int) -> bool:
        """Makes room for a sequence of `tokens`; False where the cache is full."""
        blocks = self._blocks.setdefault(serial, [])
        missing = self._pool.blocks_for(tokens) - len(blocks)
        if missing > self._pool.num_free:
            return False
        if missing > 0:
            blocks += self._pool.allocate(missing)
        return True

    def release(self, serial: int) -> None:
        if blocks := self._blocks.pop(serial, None):
            self._pool.release(blocks, serial)

    def batch(self, serials: list[int], starts: Ints, tokens: torch.Tensor, counts: Ints, positions: Ints | None = None) -> ForwardBatch:
        """The next `counts` [S] tokens (tokens: int64 [T] on the device) of each sequence, behind the `starts` [S] that lie here already.

        positions: int64 [T], where they stand in their texts, if some of those before them were left out. Logits are asked for the last
        token of each.
        """
        size = self._pool.block_size
        ends = np.cumsum(counts)
        owner = np.repeat(np.arange(len(serials)), counts)
        places = np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
        kv_lengths = starts + counts
        width = int(-(-kv_lengths.max() // size))
        tables = np.zeros((len(serials), width), np.int32)
        for row, serial in enumerate(serials):
            blocks = self._blocks[serial][:width]
            tables[row, : len(blocks)] = blocks
        slots = tables[owner, places // size].astype(np.int64) * size + places % size
        return ForwardBatch(
            token_ids=tokens,
            positions=self._tensor(places if positions is None else positions),
            slots=self._tensor(slots),
            block_tables=self._tensor(tables),
            query_start=self._tensor(np.concatenate(([0], ends)).astype(np.int32)),
            kv_lengths=self._tensor(kv_lengths.astype(np.int32)),
            logit_rows=self._tensor(ends - 1),
            max_query=int(counts.max()),
            max_kv=int(kv_lengths.max()),
        )

    def _tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
