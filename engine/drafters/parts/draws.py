"""Draws draft tokens the way their requests sample, and keeps the distributions that they were drawn from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

import kernels
from engine.noise import Stream, keys, mix, sample_seed
from kernels.reference.sequential_head import SequentialHead

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.sequence import Sequence
    from kernels.reference.sequential_head import DraftBlock

_MASK = (1 << 64) - 1
PLAIN = SequentialHead("none")


class Draws:
    """For S sequences in one attempt.

    Greedy requests get the argmax. Seeded ones get the token that the target's own noise would pick from the draft distribution: a
    function of the text, like the argmax, and the likeliest to equal the target's. Others get a sample with fresh noise.
    `probabilities` is float32 [S, D, vocab] where any request of the last kind is among them, else None. Top-k and top-p are left to
    verification: what counts is that `probabilities` is what was sampled from.
    """

    def __init__(self, sequences: list[Sequence], *, step: int, entropy: int, width: int, vocab: int, device: torch.device) -> None:
        sampling = [sequence.request.sampling for sequence in sequences]
        self.temperatures: NDArray[np.float64] = np.array([params.temperature for params in sampling])
        greedy = self.temperatures == 0.0
        seeded = ~greedy & np.array([params.seed is not None for params in sampling])
        random = ~greedy & ~seeded
        self.probabilities = torch.zeros(len(sequences), width, vocab, device=device) if random.any() else None
        self._tempered = self._noise = None
        if greedy.all():
            return
        self._tempered = torch.from_numpy(self.temperatures.astype(np.float32)).to(device)
        positions = np.array([sequence.num_generated for sequence in sequences], np.int64)[:, None] + np.arange(width)
        own = np.array([(entropy + sequence.serial) & _MASK for sequence in sequences], np.uint64)
        given = np.array([sample_seed(params.seed or 0, params.sample) for params in sampling], np.uint64)
        seeds = np.where(seeded, given, mix(mix(own)))[:, None]
        noise = np.where(seeded[:, None], keys(seeds, positions, Stream.TOKEN), keys(seeds, positions, Stream.DRAFT, attempt=step))
        self._noise = torch.from_numpy(noise.view(np.int64)).to(device)

    def draw(
        self,
        logits: torch.Tensor,
        hidden: torch.Tensor | None,
        anchors: torch.Tensor,
        first: int,
        head: SequentialHead = PLAIN,
        rows: slice = slice(None),
    ) -> DraftBlock:
        """Drafts `first` and those after it, one for each of the K slots of logits [S, K, draft vocab]; see `kernels.sequential_head`.

        rows: which of the sequences those S are.
        """
        count = logits.shape[1]
        block = kernels.sequential_head(
            logits,
            hidden,
            anchors,
            head,
            temperatures=None if self._tempered is None else self._tempered[rows],
            keys=None if self._noise is None else self._noise[rows, first : first + count],
            keep_weights=self.probabilities is not None,
        )
        if self.probabilities is not None:
            drawn_from = block.probabilities()
            if head.token_ids is None:
                self.probabilities[rows, first : first + count] = drawn_from
            else:
                self.probabilities[rows, first : first + count].index_copy_(2, head.token_ids, drawn_from)
        return block
