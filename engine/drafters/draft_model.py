"""A small model of the same vocabulary drafts for a large one (Leviathan et al. 2211.17192): greedy or sampled, with its own KV."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.drafters.parts.chain import POSITIONS, draft_chain, draftable, make_draws
from engine.drafters.parts.confidence import ConfidenceBins
from engine.drafters.parts.reader import Reader
from engine.drafters.parts.spread import Drafted

if TYPE_CHECKING:
    from engine.batch import TargetModel
    from engine.drafters.base import DraftBatch, Drafts, Host, Progress
    from engine.sequence import Sequence


class DraftModelDrafter:
    """`model` must have the target's vocabulary, token for token; `cross_vocab` drafts with any other."""

    taps: tuple[int, ...] = ()

    def __init__(self, name: str, model: TargetModel, host: Host) -> None:
        self.name = name
        self._host = host
        self._reader = Reader(model, host.num_blocks, host.block_size)
        self._bins = ConfidenceBins(POSITIONS)
        self.prior = self._bins.prior

    @torch.inference_mode()
    def propose(self, batch: DraftBatch) -> Drafts:
        rows, width = draftable(batch, self._reader.reserve)
        sequences = [batch.sequences[row] for row in rows]
        if not sequences:
            return Drafted.nothing(len(batch.sequences))
        draws = make_draws(batch, sequences, width, self._host)
        serials = [sequence.serial for sequence in sequences]
        logits = self._reader.read(serials, [sequence.tokens for sequence in sequences])
        tokens, confidences = draft_chain(logits, lambda drafted, _: self._reader.add(serials, drafted), draws, width)
        # The last draft is never fed: what it would be followed by is nobody's question.
        self._reader.drafted(serials, tokens[:, :-1].cpu().numpy())
        drafts, _ = Drafted(rows, batch.limits[rows], tokens, confidences).spread(len(batch.sequences), self._bins, draws)
        return drafts

    def observe(self, progress: Progress) -> None:
        """Reads no hidden states."""

    def finish(self, sequence: Sequence, *, complete: bool) -> None:  # noqa: ARG002 - nothing is learned here
        self._reader.forget(sequence.serial)
