"""The drafters that need nothing but text, and the names with a meaning of their own. No torch, so that a replay can draft too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from engine.drafters.ngram import NgramDrafter
from engine.drafters.suffix import SuffixDrafter

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.drafters.base import Drafter

OFF = "off"
AUTO = "auto"
PORTFOLIO = "portfolio"
TEXT = "suffix"
"""The lookup that `auto` always has: it finds what `ngram` finds in a request's own text, and siblings' answers besides."""
TEXT_DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "ngram": NgramDrafter,
    "suffix": SuffixDrafter,
}


class Supply(Protocol):
    """Where a speculator gets its drafters."""

    @property
    def members(self) -> tuple[str, ...]:
        """The drafters that take part in the portfolio, the text lookup first."""
        ...

    def tags(self, name: str) -> tuple[str, ...]:
        """The templates that a member was made for; none: all."""
        ...

    def create(self, name: str) -> Drafter:
        """The drafter of a name that requests resolve to, or of a member."""
        ...

    def retire(self, name: str) -> None:
        """Takes a drafter out of the portfolio; a request that names it still gets it."""
        ...
