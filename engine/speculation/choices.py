"""All choices of drafters: among the portfolio's, and between each that requests name and no drafts. No torch, no clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.drafters.builtin import PORTFOLIO, TEXT_DRAFTERS
from engine.speculation.portfolio import Portfolio

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from engine.speculation.experience import Records

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]


class Choices:
    """`portfolio`: for requests that leave it open. `tags`: its drafters, and the templates each is made for.

    selective: whether a drafter that a request names may be left out; where drafts are always made, nobody chooses. records: what earlier
    jobs taught of the portfolio's drafters.
    """

    def __init__(self, tags: Mapping[str, tuple[str, ...]], slots: int, *, selective: bool, records: Records | None = None) -> None:
        self.portfolio = Portfolio({}, slots)
        self._slots = slots
        self._records = records
        self._selective = selective
        self._alone: dict[str, Portfolio] = {}
        """Of drafters that requests name."""
        for name, its_tags in tags.items():
            self.add(name, its_tags)

    def add(self, name: str, tags: tuple[str, ...]) -> None:
        """See `Portfolio.add`."""
        self.portfolio.add(name, tags, None if self._records is None else self._records.recall(name))

    def keep(self) -> None:
        """What was learned of the portfolio's drafters outlasts this engine, where there is a place for it."""
        if self._records is not None:
            for name, experience in self.portfolio.experience().items():
                self._records.keep(name, experience)

    def of(self, name: str) -> Portfolio | None:
        """What decides whether drafter `name`, or which of the portfolio's, drafts for a request that asks for it."""
        if name == PORTFOLIO:
            return self.portfolio
        if self._selective and name not in TEXT_DRAFTERS and name not in self._alone:
            self._alone[name] = Portfolio({name: ()}, self._slots)
        return self._alone.get(name)

    def remove(self, name: str) -> None:
        """A drafter is gone, and what it earned is forgotten."""
        self.portfolio.remove(name)
        self._alone.pop(name, None)

    def attends(self, name: str) -> bool:
        """Whether a drafter should follow the texts, by any of them."""
        return any(choice.attends(name) for choice in self._all)

    def foresee(self, requests: int, tokens_per_second: float, shown: Mapping[str, float]) -> None:
        """See `Portfolio.foresee`."""
        for choice in self._all:
            choice.foresee(requests, tokens_per_second, shown)

    def forget(self, name: str) -> None:
        """See `Portfolio.forget`."""
        for choice in self._all:
            choice.forget(name)

    def learn(self, name: str, slots: Ints, templates: list[str | None], brought: Floats) -> None:
        """See `Portfolio.learn`."""
        for choice in self._all:
            choice.learn(name, slots, templates, brought)

    def learn_seconds(self, name: str, requests: int, seconds: float) -> None:
        """See `Portfolio.learn_seconds`."""
        for choice in self._all:
            choice.learn_seconds(name, requests, seconds)

    def learn_intake(self, name: str, tokens: int, seconds: float) -> None:
        """See `Portfolio.learn_intake`."""
        for choice in self._all:
            choice.learn_intake(name, tokens, seconds)

    @property
    def _all(self) -> tuple[Portfolio, ...]:
        return (self.portfolio, *self._alone.values())
