"""Drafters that come, change or learn while an engine runs."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from engine.checkpoints.drafters.errors import DrafterError

if TYPE_CHECKING:
    from engine.drafters.registry import Catalogue
    from engine.speculation.speculator import Speculator
    from engine.training.adapt import Adapter

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0
"""Between two looks for drafters that came or changed."""


class DrafterChanges:
    """adapting: the drafter that learns from the answers of this engine, by name, and what teaches it."""

    def __init__(self, drafters: Catalogue, speculator: Speculator, adapting: tuple[str, Adapter] | None = None) -> None:
        self._drafters = drafters
        self._speculator = speculator
        self._next_look = time.monotonic() + _LOOK_SECONDS
        self.adapting = adapting
        if adapting is not None:
            speculator.listen(adapting[1].collector)

    def learn(self) -> None:
        """Goes on with better weights of a drafter, where a round of learning from this job found some."""
        if self.adapting is None or (better := self.adapting[1].tend()) is None:
            return
        name = self.adapting[0]
        exchanged = self._speculator.exchange(name, better)
        _log.info("drafter %s %s", name, "goes on with what it learned from this job" if exchanged else "is not used any more")

    def look(self) -> None:
        """Drafters that were registered, packed with the model or exchanged meanwhile draft from the next step on."""
        if (now := time.monotonic()) < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        for name in self._drafters.changed():
            try:
                self._speculator.add(name)
            except (DrafterError, ValueError, OSError, RuntimeError) as error:
                if not self._speculator.drafts(name):  # else it goes on as it was
                    self._drafters.retire(name)
                _log.warning("the drafter %s is not used as it is now: %s", name, error)
                continue
            _log.info("the drafter %s takes part as it is now", name)
            if self.adapting is not None and self.adapting[0] == name:
                self._speculator.listen(None)
                self.adapting = None
