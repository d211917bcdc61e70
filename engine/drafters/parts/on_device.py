"""DSpark and DFlash inside a step on the device: a block of drafts for every slot of an `engine.pipeline`, in tensors alone.

The backbone is the one that drafts between steps (`BlockBackbone`), over the same keys and values; its context is read where it lies. Slots
that sample by a seed get the drafts that their own noise would pick, as `Draws` does it, so a draft is again a function of the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

import kernels
from engine.drafters.parts.confidence import EDGES, LEVELS, logit
from engine.noise import Stream
from engine.pipeline import DeviceDrafts
from engine.speculation.calibration import HIGHEST
from engine.transfer import to_device
from kernels.reference.noise import row_keys
from kernels.reference.sampling import Mode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.checkpoints.drafters.specs import BlockSpec
    from engine.drafters.parts.block import BlockBackbone
    from engine.drafters.parts.confidence import ConfidenceBins
    from engine.drafters.parts.frozen import Vocabulary
    from engine.pipeline import DeviceState
    from kernels.reference.sequential_head import SequentialHead

    Floats = NDArray[np.float64]

_UNSURE = 0.5
"""The confidence of a drafter without a confidence head."""
_EPS = 1e-7
"""As in `parts.confidence.logit`."""


class DeviceBlocks:
    """A `DeviceDrafter` that reads the target, for pipelines of `slots` slots; it is of the weights that it was made with."""

    def __init__(
        self,
        spec: BlockSpec,
        backbone: BlockBackbone,
        vocabulary: Vocabulary,
        head: SequentialHead,
        bins: ConfidenceBins,
        *,
        block_size: int,
        slots: int,
        device: torch.device,
    ) -> None:
        """block_size: of the KV cache."""
        self.taps = tuple(sorted(set(spec.taps)))
        self._spec, self._backbone, self._vocabulary, self._head = spec, backbone, vocabulary, head
        self._block_size, self._positions = block_size, bins.positions
        count = spec.drafts_per_block
        self._edges = torch.tensor(EDGES, device=device)
        self._scales = torch.from_numpy(bins.scales[..., :count].astype(np.float32)).to(device)
        self._logits = torch.from_numpy(logit(bins.prior).astype(np.float32)).to(device)
        self._shifts, self._weights = torch.zeros(slots, device=device), torch.ones(slots, device=device)
        self._first = torch.zeros(slots, dtype=torch.int64, device=device)

    def enter(self, slot: int, first: int) -> None:
        """A sequence took the slot: what its blocks hold from the `first` one on was taken in."""
        self._first[slot].fill_(first)

    def trust(self, logits: Floats, shifts: Floats, weights: Floats) -> None:
        """From the next step on: the log odds of drafts of each bin, by how much those of each slot lie above them (see `Calibration`),
        and what a token of each slot is worth. float64 [bins], [S], [S].
        """
        parts = logits, shifts, weights
        values = to_device(np.concatenate(parts).astype(np.float32), self._logits.device).split([len(part) for part in parts])
        for target, part in zip((self._logits, self._shifts, self._weights), values, strict=True):
            target.copy_(part)

    def observe(self, taps: dict[int, torch.Tensor], positions: torch.Tensor, slots: torch.Tensor) -> None:
        """See `ReadsTarget`."""
        self._backbone.take_in([taps[tap] for tap in self._spec.taps], positions, slots)

    def __call__(self, state: DeviceState) -> DeviceDrafts:
        """See `DeviceDrafter`. Slots at rest draft from nothing, in block 0."""
        spec, size, device = self._spec, self._block_size, state.last.device
        num, width = state.tables.shape
        active = state.left > 0
        tables = torch.where(active[:, None], state.tables, 0)
        first = torch.where(active, self._first, 0)
        index = torch.arange(spec.block_size, device=device)
        position = torch.where(active, state.length, 0)[:, None] + index
        slots = tables.gather(1, (position // size).clamp(max=width - 1)).long() * size + position % size
        seen = tables.gather(1, (first[:, None] + torch.arange(width, device=device)).clamp(max=width - 1))
        lengths = (position[:, 0] + spec.block_size - first * size).to(torch.int32)
        inputs = torch.where(index == 0, state.last[:, None], spec.mask_token_id)
        embedded = self._vocabulary.embed(inputs.view(-1)).view(num, spec.block_size, -1)
        hidden = self._backbone.run_paged(embedded, position.view(-1), slots.view(-1), seen, lengths)
        count, begin = spec.drafts_per_block, 0 if spec.predicts_next else 1
        hidden = hidden[:, begin : begin + count].contiguous()
        logits = self._vocabulary.head(hidden.view(num * count, -1)).view(num, count, -1)
        places = torch.arange(count, device=device)
        temperatures = torch.where(state.modes == Mode.SEEDED, state.temperatures, 0.0)
        keys = row_keys(state.seeds[:, None], state.made[:, None] + places, Stream.TOKEN, 0)
        block = kernels.sequential_head(logits, hidden, state.last, self._head, temperatures=temperatures, keys=keys)
        confidence = torch.full_like(block.lse, _UNSURE) if block.confidence is None else block.confidence
        bins = self._bins(confidence.float(), block.peak.exp(), temperatures, places)
        rates = torch.sigmoid(self._logits[bins] + self._shifts[:, None]).clamp(max=HIGHEST)
        return DeviceDrafts(block.tokens, rates.cumprod(1) * self._weights[:, None], bins)

    def _bins(self, confidence: torch.Tensor, peak: torch.Tensor, temperatures: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """As `ConfidenceBins.bins`; neither number has seen the draft that it is about."""
        bucket = torch.bucketize(temperatures, self._edges)
        temperature, offset, weight = self._scales[:, bucket]
        tempered = torch.sigmoid((torch.logit(confidence, _EPS) + weight * torch.logit(peak, _EPS) - offset) / temperature)
        # Held from below as well: a request whose numbers are none is found out a step late, and a bin that is none stops the device.
        level = (tempered * LEVELS).long().clamp(0, LEVELS - 1)
        return (bucket[:, None] * self._positions + places) * LEVELS + level
