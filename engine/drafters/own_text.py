"""Lookup in a sequence's own text, kept up to date as it grows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.drafters.matching import Match, MatchIndex

if TYPE_CHECKING:
    from engine.sequence import Sequence

_KEY_LENGTH = 2


class OwnText:
    """The lookup state of one sequence."""

    __slots__ = ("_hint", "index")

    def __init__(self) -> None:
        self.index = MatchIndex(_KEY_LENGTH)
        self._hint: Match | None = None

    def match(self, sequence: Sequence) -> Match | None:
        """Catches up with the sequence and finds its longest match."""
        new = sequence.tokens[len(self.index) :].tolist()
        self.index.extend(new)
        hint = None if self._hint is None else Match(self._hint.end + len(new), 0)
        self._hint = self.index.longest_of_self(hint)
        return self._hint
