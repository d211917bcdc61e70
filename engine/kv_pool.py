"""The paged KV cache: tensors only. Which block belongs to whom is `engine.kv_blocks`' business."""

from __future__ import annotations

import torch

import kernels
from kernels import pages


class KVPool:
    """Keys and values of `num_blocks` blocks of `block_size` tokens, for every layer.

    `keys[layer]` and `values[layer]` are [num_blocks, kv_heads, block_size, head_dim]: the tokens of one head of one block lie
    side by side, which is what both a gather by blocks and a walk over one head's context want. Slot `s` is block `s // block_size`,
    offset `s % block_size`. In memory a block's keys may lie transposed (`kernels.stores_keys_transposed`).
    A pool of float8_e4m3fn holds numbers divided by `k_scales[layer]` and `v_scales[layer]`, float32 [kv_heads] (see `engine.kv_scales`);
    for other types these are None. Contents start as zeros, so that masked reads of never-written slots are finite.
    Raises RuntimeError (torch's) when the memory is not there.
    """

    def __init__(
        self, num_layers: int, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (2, num_layers, num_blocks, kv_heads, block_size, head_dim)
        self._storage = zeros(shape, dtype, device)
        keys = self._storage[0]
        if kernels.stores_keys_transposed(dtype, device, head_dim, block_size):
            keys = keys.view(num_layers, num_blocks, kv_heads, head_dim, block_size).transpose(3, 4)
        # By their bits: not every torch can index numbers of eight bits.
        self._parts = [part.view(torch.uint8) if dtype.itemsize == 1 else part for part in (keys, self._storage[1])]
        self.keys: list[torch.Tensor] = list(keys)
        self.values: list[torch.Tensor] = list(self._storage[1])
        scales = torch.ones(2, num_layers, kv_heads, device=device) if dtype == torch.float8_e4m3fn else None
        self.k_scales: list[torch.Tensor | None] = [None] * num_layers if scales is None else list(scales[0])
        self.v_scales: list[torch.Tensor | None] = [None] * num_layers if scales is None else list(scales[1])

    def take_pages(self, num_blocks: int) -> None:
        """Has the system give the pages of the first blocks before they are written. Slow on machines that are virtual; any thread may."""
        if self._storage.device.type == "cpu":
            for part in self._storage.flatten(0, 1):
                pages.take(part[:num_blocks])

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies what lies in slots `sources` to slots `targets`, both int64 [N], in all layers. All is read before any is written."""
        blocks, places = sources // self.block_size, sources % self.block_size
        to_blocks, to_places = targets // self.block_size, targets % self.block_size
        for part in self._parts:
            part[:, to_blocks, :, to_places] = part[:, blocks, :, places]

    @property
    def nbytes(self) -> int:
        return self._storage.nbytes


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros for a cache. On a CPU as pages that are taken when they are first written: a small job then never pays for a large pool."""
    return torch.zeros(shape, dtype=dtype, device=device) if device.type != "cpu" else pages.zeros(shape, dtype)
