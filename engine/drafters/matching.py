"""Longest-match lookup in token text, incrementally: the hash chains of LZ77 coders over tokens instead of bytes. No torch."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

MAX_MATCH = 32
"""A longer agreement tells nothing more: bins of lookup drafters end here."""
_TOKEN_BITS = 21
_NONE = -1


@dataclass(frozen=True, slots=True)
class Match:
    """`length` tokens before `end` agree with the last ones of the text asked about; what follows `end` may follow it, too."""

    end: int
    length: int


class MatchIndex:
    """All tokens of one or more texts, findable by their last `key_length` ones.

    Adding a token costs one dictionary entry; a lookup looks at no more than `max_chain` places, latest first. Memory is
    about 150 bytes a token.
    """

    def __init__(self, key_length: int, max_chain: int = 16) -> None:
        if not 1 <= key_length <= 3:
            raise ValueError(f"key_length must be 1, 2 or 3, got {key_length}")
        self._key_length = key_length
        self._mask = (1 << (_TOKEN_BITS * key_length)) - 1
        self._max_chain = max_chain
        self._tokens = array("i")
        self._previous = array("i", [_NONE])
        self._latest: dict[int, int] = {}
        self._key = 0
        self._run = 0

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Adds tokens to the current text."""
        key, run, mask = self._key, self._run, self._mask
        latest, append, link = self._latest, self._tokens.append, self._previous.append
        for end, token in enumerate(tokens, len(self._tokens) + 1):
            append(token)
            key = (key << _TOKEN_BITS | token) & mask
            run += 1
            if run < self._key_length:
                link(_NONE)
                continue
            link(latest.get(key, _NONE))
            latest[key] = end
        self._key, self._run = key, run

    def close_text(self) -> None:
        """Ends the current text: no match will run across."""
        self._tokens.append(_NONE)
        self._previous.append(_NONE)
        self._key = self._run = 0

    def longest_of_self(self, hint: Match | None = None) -> Match | None:
        """The longest earlier occurrence of the current text's own end; the latest one among equals.

        `hint` is a match that may have gone on: the one found before the last tokens were added.
        """
        end = len(self._tokens)
        best = None
        if hint is not None and hint.end < end:
            length = self._agreement(self._tokens, end, hint.end)
            best = Match(hint.end, length) if length >= self._key_length else None
        return self._walk(self._tokens, end, self._previous[end], best)

    def longest(self, text: Sequence[int]) -> Match | None:
        """The longest occurrence of the end of another text."""
        if len(text) < self._key_length:
            return None
        key = 0
        for token in text[len(text) - self._key_length :]:
            key = key << _TOKEN_BITS | token
        return self._walk(text, len(text), self._latest.get(key, _NONE), None)

    def following(self, match: Match, count: int) -> list[int]:
        """Up to `count` tokens after a match, to the end of its text."""
        found = self._tokens[match.end : match.end + count].tolist()
        return found[: found.index(_NONE)] if _NONE in found else found

    def repeating(self, match: Match, count: int) -> list[int]:
        """Exactly `count` tokens after a match with the text's own end, which goes on in circles where it reaches that end."""
        found = self._tokens[match.end : match.end + count].tolist()
        period = len(self._tokens) - match.end
        while len(found) < count:
            found += found[len(found) - period :][: count - len(found)]
        return found

    def _walk(self, text: Sequence[int], end: int, place: int, best: Match | None) -> Match | None:
        tokens, previous = self._tokens, self._previous
        longest = best.length if best is not None else self._key_length - 1
        for _ in range(self._max_chain):
            if place == _NONE or longest >= MAX_MATCH:
                break
            # Only a place that also agrees one token further back than the best so far can be longer.
            if longest < end and longest < place and tokens[place - longest - 1] == text[end - longest - 1]:
                length = self._agreement(text, end, place)
                if length > longest:
                    best, longest = Match(place, length), length
            place = previous[place]
        return best

    def _agreement(self, text: Sequence[int], end: int, place: int) -> int:
        tokens = self._tokens
        limit = min(end, place, MAX_MATCH)
        length = 0
        while length < limit and (token := tokens[place - length - 1]) == text[end - length - 1] and token != _NONE:
            length += 1
        return length


def match_bins(length: int, count: int) -> list[int]:
    """Bins of `count` drafts that continue a match of `length`: a draft that stands makes the match one longer."""
    return [min(length + index, MAX_MATCH) for index in range(count)]


def match_prior() -> NDArray[np.float64]:
    """Chance that the token after a match of each length is right, before anything is known: 0.25 at 2, 0.5 at 6, 0.84 at 32.

    Rather low: what a first long match is wrong about costs a whole step, and a few drafts that stand correct it.
    """
    length = np.arange(MAX_MATCH + 1)
    return length / (length + 6.0)
