"""A small model with another tokenizer drafts through text: string-level exact match (SLEM, arXiv 2502.05202).

The draft model goes on greedily, so its drafts are a function of the text: exact for greedy requests, and a point mass for sampled ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.drafters.base import DraftBatch, Drafts
from engine.drafters.parts.confidence import BUCKETS, bucket_of
from engine.drafters.parts.reader import Reader
from engine.drafters.parts.tokenizers import Translation, continuation, decode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.batch import TargetModel
    from engine.drafters.base import Host, Progress
    from engine.sequence import Sequence

_POSITIONS = 16
_CONTEXT = 4
"""Draft tokens in front of new ones when their text is read: a token's text may depend on its neighbour."""
_SPARE = 2
"""Draft tokens more than target tokens are wanted; the last target token is cut off in mid-word more often than not."""


class CrossVocabDrafter:
    """`model` and `tokenizer` are the draft model's own."""

    taps: tuple[int, ...] = ()
    prior: NDArray[np.float64] = np.full(BUCKETS * _POSITIONS, 0.5)

    def __init__(self, name: str, model: TargetModel, tokenizer: Any, host: Host) -> None:
        self.name = name
        self._spec = model.spec
        self._own = tokenizer
        self._target = host.target.spec
        self._theirs = host.tokenizer.hf
        self._reader = Reader(model, host.num_blocks, host.block_size)
        self._texts: dict[int, Translation] = {}

    @torch.inference_mode()
    def propose(self, batch: DraftBatch) -> Drafts:
        count = int(batch.limits.max(initial=0)) + _SPARE
        rows: list[int] = []
        texts: list[NDArray[np.int64]] = []
        for row in np.flatnonzero(batch.limits > 0).tolist():
            translated = self._translate(batch.sequences[row])
            if translated is not None and self._reader.reserve(batch.sequences[row].serial, len(translated) + count):
                rows.append(row)
                texts.append(np.array(translated, np.int64))
        found: list[tuple[list[int], list[int]]] = [([], [])] * len(batch.sequences)
        if not rows:
            return Drafts.certain(found)
        said = self._say([batch.sequences[row].serial for row in rows], texts, count)
        for row, text, tokens in zip(rows, texts, said.tolist(), strict=True):
            found[row] = self._draft(batch.sequences[row], text.tolist(), tokens, int(batch.limits[row]))
        return Drafts.certain(found)

    def observe(self, progress: Progress) -> None:
        """Reads no hidden states."""

    def finish(self, sequence: Sequence, *, complete: bool) -> None:  # noqa: ARG002 - nothing is learned here
        self._texts.pop(sequence.serial, None)
        self._reader.forget(sequence.serial)

    def _translate(self, sequence: Sequence) -> list[int] | None:
        text = self._texts.get(sequence.serial)
        if text is None:
            text = self._texts[sequence.serial] = Translation(self._theirs, self._own)
        return text.of(sequence.tokens.tolist()) or None

    def _say(self, serials: list[int], texts: list[NDArray[np.int64]], count: int) -> NDArray[np.int64]:
        """int64 [S, count]: how the draft model goes on, greedily."""
        logits = self._reader.read(serials, texts)
        tokens = [logits.argmax(1)]
        while len(tokens) < count:
            tokens.append(self._reader.add(serials, tokens[-1]).argmax(1))
        said = torch.stack(tokens, 1).cpu().numpy()
        self._reader.drafted(serials, said[:, :-1])
        return said

    def _draft(self, sequence: Sequence, text: list[int], said: list[int], limit: int) -> tuple[list[int], list[int]]:
        """What the draft model said, in the target's tokens, and their bins."""
        ended = next((place for place, token in enumerate(said) if token in self._spec.eos_token_ids), None)
        said = said[:ended]
        context = text[-_CONTEXT:]
        before, after = decode(self._own, context), decode(self._own, context + said)
        drafts: list[int] = []
        if after.startswith(before):
            drafts = continuation(self._theirs, sequence.tokens[-8:].tolist(), after[len(before) :])
        if ended is None:
            drafts = drafts[:-1]
        elif self._target.eos_token_ids and (drafts or not said):
            drafts = [*drafts, self._target.eos_token_ids[0]]
        drafts = [token for token in drafts[:limit] if token < self._target.vocab_size]
        bucket = int(bucket_of(np.array([sequence.request.sampling.temperature]))[0])
        return drafts, [bucket * _POSITIONS + min(place, _POSITIONS - 1) for place in range(len(drafts))]
