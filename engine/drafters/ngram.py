"""Prompt lookup: a sequence's own earlier text drafts for it (Saxena 2023), by longest match, without rescanning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.drafters.base import DraftBatch, Drafts
from engine.drafters.matching import match_bins, match_prior
from engine.drafters.own_text import OwnText

if TYPE_CHECKING:
    from engine.drafters.base import Progress
    from engine.sequence import Sequence


class NgramDrafter:
    """Drafts from prompt and output of the same request. Costs some microseconds a sequence and step, and no model."""

    name = "ngram"
    taps: tuple[int, ...] = ()
    prior = match_prior()

    def __init__(self) -> None:
        self._texts: dict[int, OwnText] = {}

    def propose(self, batch: DraftBatch) -> Drafts:
        return Drafts.certain([self._draft(sequence, int(limit)) for sequence, limit in zip(batch.sequences, batch.limits, strict=True)])

    def observe(self, progress: Progress) -> None:
        """Reads no hidden states."""

    def finish(self, sequence: Sequence, *, complete: bool) -> None:  # noqa: ARG002 - nothing is learned here
        self._texts.pop(sequence.serial, None)

    def _draft(self, sequence: Sequence, limit: int) -> tuple[list[int], list[int]]:
        if limit <= 0:
            return [], []
        text = self._texts.get(sequence.serial)
        if text is None:
            text = self._texts[sequence.serial] = OwnText()
        match = text.match(sequence)
        if match is None:
            return [], []
        return text.index.repeating(match, limit), match_bins(match.length, limit)
