"""Drafters by name. A new one is a file and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.drafters.ngram import NgramDrafter
from engine.drafters.suffix import SuffixDrafter

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.drafters.base import Drafter

OFF = "off"
AUTO = "auto"
_DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "ngram": NgramDrafter,
    "suffix": SuffixDrafter,
}
_AUTOMATIC = "suffix"


class UnknownDrafterError(ValueError):
    """A request or configuration names a drafter that is not there."""


def drafter_names() -> list[str]:
    """What a request may ask for."""
    return [AUTO, OFF, *sorted(_DRAFTERS)]


def resolve(name: str, default: str) -> str | None:
    """The drafter that a request's `name` comes to, None for no drafting. `auto` means `default`, and that one's `auto` the best known.

    Raises UnknownDrafterError with the names there are.
    """
    name = default if name == AUTO else name
    name = _AUTOMATIC if name == AUTO else name
    if name == OFF:
        return None
    if name not in _DRAFTERS:
        raise UnknownDrafterError(f"there is no drafter {name!r}; known are {', '.join(drafter_names())}")
    return name


def create(name: str) -> Drafter:
    """A new drafter of a name that `resolve` returned."""
    return _DRAFTERS[name]()
