"""A suffix index over the whole job: finished answers of sibling requests draft for the rest, beside a sequence's own text."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING

from engine.drafters.base import DraftBatch, Drafts
from engine.drafters.matching import MAX_MATCH, MatchIndex, match_bins, match_prior
from engine.drafters.own_text import OwnText

if TYPE_CHECKING:
    from engine.drafters.base import Progress
    from engine.drafters.matching import Match
    from engine.sequence import Sequence

_KEY_LENGTH = 3
_OTHERS = 8
"""Other templates that are looked through where a request's own knows nothing."""
LEAD = 16
"""Prompt tokens kept in front of a finished answer, so that the first tokens of a sibling's answer find it."""


class SiblingTexts:
    """Finished answers of one template, in two generations: when the younger is full, the older is dropped."""

    __slots__ = ("_half", "_old", "_young")

    def __init__(self, max_tokens: int) -> None:
        self._half = max(max_tokens // 2, 1)
        self._old: MatchIndex | None = None
        self._young = MatchIndex(_KEY_LENGTH)

    def __len__(self) -> int:
        return len(self._young) + (len(self._old) if self._old is not None else 0)

    def add(self, tokens: list[int]) -> None:
        if len(self._young) + len(tokens) > self._half and len(self._young):
            self._old, self._young = self._young, MatchIndex(_KEY_LENGTH)
        self._young.extend(tokens[: self._half])
        self._young.close_text()

    def longest(self, text: list[int]) -> tuple[MatchIndex, Match] | None:
        found = None
        for index in (self._young, self._old):
            match = index.longest(text) if index is not None else None
            if index is not None and match is not None and (found is None or match.length > found[1].length):
                found = (index, match)
        return found


class SuffixDrafter:
    """The longest match wins, the sequence's own text on a tie. Siblings of the same template come first, and requests without
    a template are siblings of each other.

    Holds at most about `max_tokens` tokens of finished text (150 bytes each); the template used longest ago goes first.
    """

    name = "suffix"
    taps: tuple[int, ...] = ()
    prior = match_prior()

    def __init__(self, max_tokens: int = 400_000) -> None:
        self._max_tokens = max_tokens
        self._own: dict[int, OwnText] = {}
        self._siblings: OrderedDict[str | None, SiblingTexts] = OrderedDict()

    def propose(self, batch: DraftBatch) -> Drafts:
        return Drafts.certain([self._draft(sequence, int(limit)) for sequence, limit in zip(batch.sequences, batch.limits, strict=True)])

    def observe(self, progress: Progress) -> None:
        """Reads no hidden states."""

    def finish(self, sequence: Sequence, *, complete: bool) -> None:
        self._own.pop(sequence.serial, None)
        if not complete:
            return
        self.remember(sequence.request.template, sequence.tokens[max(sequence.prompt_length - LEAD, 0) :].tolist())

    def remember(self, template: str | None, tokens: list[int]) -> None:
        """An answer, here or finished elsewhere, with the last `LEAD` tokens of its prompt before it."""
        siblings = self._siblings.setdefault(template, SiblingTexts(self._max_tokens))
        self._siblings.move_to_end(template)
        siblings.add(tokens)
        while len(self._siblings) > 1 and sum(map(len, self._siblings.values())) > self._max_tokens:
            self._siblings.popitem(last=False)

    def _in_siblings(self, sequence: Sequence) -> tuple[MatchIndex, Match] | None:
        """In answers of its own template, else in those without one, else in those of the templates used last."""
        template = sequence.request.template
        text = sequence.tokens[-MAX_MATCH:].tolist()
        siblings = self._siblings.get(template)
        found = siblings.longest(text) if siblings is not None else None
        known = [None] if None in self._siblings else []
        for other in (*known, *islice(reversed(self._siblings), _OTHERS + 1)):
            if found is not None:
                break
            if other != template:
                found = self._siblings[other].longest(text)
        return found

    def _draft(self, sequence: Sequence, limit: int) -> tuple[list[int], list[int]]:
        if limit <= 0:
            return [], []
        own = self._own.get(sequence.serial)
        if own is None:
            own = self._own[sequence.serial] = OwnText()
        match = own.match(sequence)
        if match is None or match.length < MAX_MATCH:
            found = self._in_siblings(sequence)
            if found is not None and (match is None or found[1].length > match.length):
                tokens = found[0].following(found[1], limit)
                return tokens, match_bins(found[1].length, len(tokens))
        if match is None:
            return [], []
        return own.index.repeating(match, limit), match_bins(match.length, limit)
