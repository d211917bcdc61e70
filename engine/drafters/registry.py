"""Drafters by name, for one engine. What needs nothing but text is built in (see `builtin`); others are found by `sources`."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from engine.checkpoints.drafters.errors import DrafterError
from engine.drafters.builtin import AUTO, OFF, PORTFOLIO, TEXT, TEXT_DRAFTERS
from engine.drafters.sources import Source, find_automatic, named, places_stamp, third_party
from kernels import pages

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.batch import ModelSpec
    from engine.drafters.base import Drafter, Host

_log = logging.getLogger(__name__)


class UnknownDrafterError(ValueError):
    """A request or configuration names a drafter that is not there."""


def _make(source: Source, host: Host) -> Drafter:
    """What it was made from on the way goes back to the system: a KV cache that fills its budget may lie beside it."""
    made = source.make(host)
    pages.give_back()
    return made


class Catalogue:
    """What one engine can draft with. `default` is what a request's `auto` means.

    With `auto`, whatever `find_automatic` knows takes part, and every request is drafted for by what has earned it (`portfolio`). Any
    other name than a built-in's is looked up at once. Raises UnknownDrafterError or DrafterError where it is not there or does not fit.
    """

    def __init__(self, default: str, directory: Path | None, spec: ModelSpec) -> None:
        self._default = default
        self._directory, self._spec = directory, spec
        self._stamp = places_stamp(directory)
        self._sources = {source.name: source for source in third_party()}
        self._host: Host | None = None
        if default in (AUTO, PORTFOLIO):
            self._sources |= {source.name: source for source in find_automatic(directory, spec)}
        elif default not in (OFF, *TEXT_DRAFTERS, *self._sources):
            source = self._look_up(default, spec)
            self._default = source.name
            self._sources[source.name] = source
        self._made: dict[str, Drafter] = {}

    @property
    def bytes_per_token(self) -> int:
        """What the drafters that `auto` and the default use keep for each token of the target's KV cache."""
        return sum(source.bytes_per_token for source in self._sources.values() if self._eager(source))

    @property
    def members(self) -> tuple[str, ...]:
        """The drafters that take part in the portfolio, the text lookup first."""
        return (TEXT, *(source.name for source in self._sources.values() if source.automatic))

    def prepare(self, host: Host) -> None:
        """Makes the drafters that will be used in any case. An automatic one that does not fit is dropped with a warning."""
        self._host = host
        for source in [source for source in self._sources.values() if self._eager(source)]:
            try:
                self._made[source.name] = _make(source, host)
            except (DrafterError, ValueError, OSError) as error:
                if source.name == self._default:
                    raise DrafterError(f"the drafter {source.name} ({source.origin}) cannot be used: {error}") from error
                _log.warning("the drafter %s (%s) is not used: %s", source.name, source.origin, error)
                del self._sources[source.name]

    def changed(self) -> list[str]:
        """Looks again where `auto` looks. Returns the drafters that were added or exchanged since: `create` makes them as they are now.

        What was taken away goes on drafting. Empty where the default is a drafter of its own.
        """
        if self._default not in (AUTO, PORTFOLIO):
            return []
        try:
            stamp = places_stamp(self._directory)
        except OSError:  # something is being moved right now: the next look sees it whole
            return []
        if stamp == self._stamp:
            return []
        self._stamp = stamp
        found = {source.name: source for source in find_automatic(self._directory, self._spec)}
        new = [name for name, source in found.items() if name not in self._sources or self._sources[name].stamp != source.stamp]
        for name in new:
            self._sources[name] = found[name]
            self._made.pop(name, None)
        return new

    @property
    def ready(self) -> tuple[str, ...]:
        """What `prepare` made and nobody uses yet."""
        return tuple(self._made)

    def made(self) -> dict[str, Drafter]:
        """By name, what `prepare` made and nobody uses yet."""
        return dict(self._made)

    def watch(self, name: str, around: Callable[[Drafter], Drafter]) -> None:
        """Puts something round a drafter that `prepare` made, before anyone uses it. Raises UnknownDrafterError where there is none."""
        if name not in self._made:
            raise UnknownDrafterError(f"{name!r} is not among the drafters that are ready: {', '.join(sorted(self._made)) or 'none'}")
        self._made[name] = around(self._made[name])

    def names(self) -> list[str]:
        """What a request may ask for."""
        several = [PORTFOLIO] if len(self.members) > 1 else []
        return [AUTO, OFF, *several, *sorted({*TEXT_DRAFTERS, *self._sources})]

    def resolve(self, name: str) -> str | None:
        """The drafter that a request's `name` comes to, None for no drafting. Raises UnknownDrafterError with the names there are."""
        name = self._default if name == AUTO else name
        if name in (AUTO, PORTFOLIO):
            name = PORTFOLIO if len(self.members) > 1 else TEXT
        if name == OFF:
            return None
        if name not in self.names():
            raise UnknownDrafterError(f"there is no drafter {name!r}; known are {', '.join(self.names())}")
        return name

    def tags(self, name: str) -> tuple[str, ...]:
        """The templates that a drafter was made for, by its record; none: all."""
        return self._sources[name].tags

    def stamp(self, name: str) -> tuple[object, ...]:
        """Differs once a drafter's files were exchanged."""
        return self._sources[name].stamp

    def create(self, name: str) -> Drafter:
        """The drafter of a name that `resolve` returned or that is a member. Raises DrafterError where it does not fit the target."""
        if name in TEXT_DRAFTERS:
            return TEXT_DRAFTERS[name]()
        made = self._made.pop(name, None)
        if made is not None:
            return made
        if self._host is None:
            raise RuntimeError("prepare() comes before create()")
        return _make(self._sources[name], self._host)

    def retire(self, name: str) -> None:
        """Takes a drafter out of the portfolio; a request that names it still gets it."""
        self._sources[name] = replace(self._sources[name], automatic=False)

    def _eager(self, source: Source) -> bool:
        """Made with the engine: hidden states of the first tokens already count."""
        return source.name == self._default or (self._default in (AUTO, PORTFOLIO) and source.automatic)

    def _look_up(self, name: str, spec: ModelSpec) -> Source:
        try:
            return named(name, spec)
        except DrafterError as error:
            raise UnknownDrafterError(f"{error}; known are {', '.join(self.names())}") from error
