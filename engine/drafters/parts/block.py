"""The parallel backbone of DSpark and DFlash: a block of slots that attends to the target's features and to itself.

The features' keys and values lie in the same block layout as the target's KV cache, so prefixes that sequences share are shared here, too,
and rejected drafts need no undoing: only confirmed tokens are ever written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

import kernels
from engine.drafters.parts.layers import Weights, attention_inputs, context_projection, finish_keys, finish_layer, read_rope, take_layer
from engine.drafters.parts.layers import unweighted_norm as _unweighted
from engine.kv_pool import zeros
from engine.transfer import to_device
from kernels import pages

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.checkpoints.drafters.specs import BlockSpec

Carried = list[tuple[torch.Tensor, torch.Tensor]]
"""Per layer, keys and values [S, kv_heads, slots, head_dim] of the blocks drafted before, when blocks are chained."""


class BlockBackbone:
    """`num_blocks` blocks of `block_size` context tokens, as the target's KV pool has; the memory of the first ones is taken at once."""

    def __init__(self, spec: BlockSpec, weights: Weights, *, num_blocks: int, block_size: int, first_blocks: int = 0) -> None:
        self._spec = spec
        self._eps = spec.layers.norm_eps
        layers = spec.layers
        self.exchange(weights)
        self._rope = read_rope(layers, weights.device)
        self._dtype, self._device = weights.dtype, weights.device
        self._block_size = block_size
        shape = (num_blocks * block_size, layers.num_kv_heads, layers.head_dim)
        self._keys, self._values = ([zeros(shape, weights.dtype, weights.device) for _ in self._layers] for _ in range(2))
        if first_blocks and weights.device.type == "cpu":
            for cache in (*self._keys, *self._values):
                pages.take(cache[: first_blocks * block_size])
        self._known = np.zeros(num_blocks * block_size, bool)

    def exchange(self, weights: Weights) -> None:
        """Other weights of the same shape. Context that was taken in stays as the old ones made it."""
        layers = self._spec.layers
        self._fc = weights.linear("fc")
        self._hidden_norm = weights.take("hidden_norm.weight")
        self._norm = weights.take("norm.weight")
        self._layers = [take_layer(weights, layers, f"layers.{index}.") for index in range(layers.num_layers)]
        self._context = context_projection(weights, layers)

    @property
    def nbytes(self) -> int:
        """Of the context's keys and values."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    def take_in(self, taps: list[torch.Tensor], positions: torch.Tensor, slots: torch.Tensor) -> None:
        """Takes in confirmed tokens: the target's hidden states [T, hidden] at each tap; where they stand, where their KV lies: int64 [T].

        All on the device, and nothing is asked of the host, who says what was `saw`n. What goes to a slot of block 0 is nobody's.
        """
        layers = self._spec.layers
        features = kernels.linear(torch.cat(taps, dim=-1).to(self._dtype), self._fc)
        features = kernels.rms_norm(features, self._hidden_norm, self._eps)
        rows = kernels.linear(features, self._context).view(len(slots), layers.num_layers, -1, layers.head_dim)
        angles = self._rope.angles(positions, self._dtype)
        for index, layer in enumerate(self._layers):
            k, v = finish_keys(layer, layers, rows[:, index, : layers.num_kv_heads], angles)
            if v is None:
                v = rows[:, index, layers.num_kv_heads :]
                v = _unweighted(v, self._eps) if layers.sandwich else v
            self._keys[index].index_copy_(0, slots, k)
            self._values[index].index_copy_(0, slots, v)

    def saw(self, slots: NDArray[np.int64]) -> None:
        """What lies here was taken in."""
        self._known[slots] = True

    def overwrite(self, slots: NDArray[np.int64]) -> None:
        """What lies here now was never taken in: nobody sees it."""
        self._known[slots] = False

    def copy(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """What was taken in at `sources` is at `targets`, too: int64 [N]. All is read before any is written."""
        self._known[targets] = self._known[sources]
        read, write = to_device(sources, self._device), to_device(targets, self._device)
        for cache in (*self._keys, *self._values):
            cache.index_copy_(0, write, cache.index_select(0, read))

    def knows(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool, in the shape of `slots`: whether what lies there was taken in."""
        return np.asarray(self._known[slots])

    def run(
        self,
        embedded: torch.Tensor,
        starts: NDArray[np.int64],
        tables: NDArray[np.int64],
        lengths: NDArray[np.int64],
        carried: Carried | None = None,
    ) -> tuple[torch.Tensor, Carried]:
        """One pass over a block of G slots of S sequences; returns normalised hidden states [S, G, hidden], and what a next block needs.

        embedded: [S, G, hidden], the anchor's embedding and the mask's. starts: positions of the first slots. tables: [S, W] context
        blocks, of which `lengths` tokens are context. All int64 [S].
        """
        num, slots, _ = embedded.shape
        layers = self._spec.layers
        positions = starts[:, None] + np.arange(slots)
        angles = self._rope.angles(torch.from_numpy(positions.reshape(-1)).to(self._device), self._dtype)
        before = carried[0][0].shape[2] if carried else 0
        masks = {window: self._mask(positions, tables, lengths, before, window) for window in set(self._spec.windows)}
        blocks = torch.from_numpy(tables.reshape(-1)).to(self._device)
        hidden = embedded.reshape(num * slots, -1)
        kept: Carried = []
        for index, layer in enumerate(self._layers):
            x = kernels.rms_norm(hidden, layer.input_norm, self._eps)
            q, k, v = attention_inputs(layer, layers, x, angles)
            k, v = (part.reshape(num, slots, layers.num_kv_heads, layers.head_dim).transpose(1, 2) for part in (k, v))
            if carried:
                k, v = torch.cat((carried[index][0], k), 2), torch.cat((carried[index][1], v), 2)
            kept.append((k, v))
            keys = torch.cat((self._gather(self._keys[index], blocks, num), k), 2)
            values = torch.cat((self._gather(self._values[index], blocks, num), v), 2)
            hidden = finish_layer(layer, layers, self._attend(q, keys, values, masks[self._spec.windows[index]], slots), hidden)
        return kernels.rms_norm(hidden, self._norm, self._eps).view(num, slots, -1), kept

    def run_paged(
        self, embedded: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """As `run` for one block, with everything on the device: normalised hidden states [S, G, hidden].

        The block's own keys and values go to `slots` int64 [S * G] behind its context, where the context itself goes once its tokens are
        confirmed. positions: int64 [S * G]. tables: int32 [S, W], the blocks that are seen; lengths: int32 [S], tokens in them, the block
        included. All of them were taken in.
        """
        num, width, _ = embedded.shape
        layers, spec = self._spec.layers, self._spec
        angles = self._rope.angles(positions, self._dtype)
        starts = torch.arange(0, num * width + 1, width, dtype=torch.int32, device=embedded.device)
        plans = {
            window: kernels.plan_attention(
                tables, starts, lengths, slots, cache=self._pages(self._keys[0]), num_heads=layers.num_heads, window=window,
                causal=window is not None and spec.causal_windows,
            )
            for window in set(spec.windows)
        }  # fmt: skip
        hidden = embedded.reshape(num * width, -1)
        for index, layer in enumerate(self._layers):
            x = kernels.rms_norm(hidden, layer.input_norm, self._eps)
            q, k, v = attention_inputs(layer, layers, x, angles)
            self._keys[index].index_copy_(0, slots, k)
            self._values[index].index_copy_(0, slots, v)
            pages = self._pages(self._keys[index]), self._pages(self._values[index])
            attended = kernels.attention(q, *pages, plans[spec.windows[index]], layers.attention_scale)
            hidden = finish_layer(layer, layers, attended.reshape(num * width, -1), hidden)
        return kernels.rms_norm(hidden, self._norm, self._eps).view(num, width, -1)

    def _pages(self, cache: torch.Tensor) -> torch.Tensor:
        """A layer's keys or values as paged kernels see them: [num_blocks, kv_heads, block_size, head_dim]."""
        return cache.unflatten(0, (-1, self._block_size)).transpose(1, 2)

    def _attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, slots: int) -> torch.Tensor:
        """The query heads of one key head become rows of one product. mask: float [S, 1, G or 1, L]."""
        layers = self._spec.layers
        num, repeat = len(keys), layers.num_heads // layers.num_kv_heads
        rows = q.reshape(num, slots, layers.num_kv_heads, repeat, layers.head_dim).permute(0, 2, 3, 1, 4)
        rows = rows.reshape(num, layers.num_kv_heads, repeat * slots, layers.head_dim)
        mask = mask.repeat(1, 1, repeat, 1) if mask.shape[2] > 1 else mask.expand(-1, -1, repeat * slots, -1)
        out = functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=layers.attention_scale)
        out = out.view(num, layers.num_kv_heads, repeat, slots, layers.head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(num * slots, -1)

    def _gather(self, cache: torch.Tensor, blocks: torch.Tensor, num: int) -> torch.Tensor:
        """[S, kv_heads, W * block_size, head_dim]."""
        layers = self._spec.layers
        rows = cache.view(-1, self._block_size * layers.num_kv_heads * layers.head_dim).index_select(0, blocks)
        return rows.view(num, -1, layers.num_kv_heads, layers.head_dim).transpose(1, 2)

    def _mask(
        self, positions: NDArray[np.int64], tables: NDArray[np.int64], lengths: NDArray[np.int64], before: int, window: int | None
    ) -> torch.Tensor:
        """What each slot sees: known context tokens, then the slots of earlier blocks, then its own block."""
        size = self._block_size
        place = np.arange(tables.shape[1] * size)
        slots = (tables[:, :, None] * size + np.arange(size)).reshape(len(tables), -1)
        context = ((place < lengths[:, None]) & self._known[slots])[:, None]
        block = np.ones((len(tables), 1, before + positions.shape[1]), bool)
        if window is not None:
            context = context & (positions[:, :, None] - place < window)
            own = np.concatenate((positions[:, :1] - before + np.arange(before), positions), axis=1)[:, None]
            apart = positions[:, :, None] - own
            block = (apart < window) & ((apart >= 0) if self._spec.causal_windows else (apart > -window))
        seen = np.concatenate((context, block), axis=2)[:, None]
        return torch.zeros(seen.shape, dtype=self._dtype).masked_fill_(torch.from_numpy(~seen), float("-inf")).to(self._device)
