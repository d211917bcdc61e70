"""The drafters in use: loaded when first wanted, shown the hidden states that they draft from, left out while they rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.drafters.base import Exchangeable, PutsOff, Rests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from numpy.typing import NDArray

    from engine.drafters.base import Drafter, Listener, Progress
    from engine.drafters.builtin import Supply
    from engine.sequence import Sequence
    from engine.speculation.choices import Choices
    from engine.speculation.cost_model import CostModel
    from engine.speculation.track_record import TrackRecord

_BACKLOG = 1024
"""Tokens of hidden states that are kept at most for a drafter that is not chosen: 12 MB of a model of 135M, five taps."""


class LoadedDrafters:
    """By name. `listener` is shown the hidden states of every step, and every sequence that ends.

    `crowded`: steps are so full that a draft hardly pays, so drafters that may rest do. cost: knows how slow the machine is just now.
    selective: whether any drafter may rest. clock: nanoseconds.
    """

    def __init__(
        self, supply: Supply, choices: Choices, record: TrackRecord, cost: CostModel, *, selective: bool, clock: Callable[[], int]
    ) -> None:
        self._supply, self._choices, self._record, self._cost = supply, choices, record, cost
        self._selective = selective
        self._clock = clock
        self._drafters: dict[str, Drafter] = {}
        self._resting: dict[str, Rests] = {}
        """Those of them that may rest."""
        self.listener: Listener | None = None
        self.crowded = False

    def __contains__(self, name: str) -> bool:
        return name in self._drafters

    def __getitem__(self, name: str) -> Drafter:
        return self._drafters[name]

    def load(self, name: str) -> None:
        """Where it is not there yet. Raises ValueError where the drafter does not fit the target."""
        if name not in self._drafters:
            self.keep(name, self._supply.create(name))

    def keep(self, name: str, drafter: Drafter) -> None:
        """A drafter that was made; nothing is known of it."""
        self._drafters[name] = drafter
        if self._selective and isinstance(drafter, Rests):
            self._resting[name] = drafter
        self._record.add(name, drafter.prior)

    def remove(self, name: str) -> None:
        """Unloads it, and forgets what was learned of it."""
        self._drafters.pop(name, None)
        self._resting.pop(name, None)
        self._record.remove(name)

    def exchange(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Other weights for a drafter. Raises TypeError where its weights cannot be exchanged."""
        drafter: object = self._drafters[name]
        if not isinstance(drafter, Exchangeable):
            raise TypeError(f"the weights of {name} cannot be exchanged")
        drafter.exchange(tensors)

    @property
    def taps(self) -> tuple[int, ...]:
        """Hidden-state indices that are wanted in the next step."""
        wanted = {tap for name, drafter in self._drafters.items() if not self.rests(name) for tap in drafter.taps}
        return tuple(sorted(wanted if self.listener is None else wanted.union(self.listener.taps)))

    @property
    def readers(self) -> list[str]:
        """Names of those that draft from hidden states."""
        return [name for name, drafter in self._drafters.items() if drafter.taps]

    @property
    def may_rest(self) -> bool:
        """Whether there is one that may."""
        return bool(self._resting)

    def rests(self, name: str) -> bool:
        """Whether a drafter is not to be shown hidden states now."""
        return name in self._resting and (self.crowded or not self._choices.attends(name))

    def follows(self, names: Iterable[str], sequences: list[Sequence]) -> dict[str, NDArray[np.bool_]]:
        """For whom of `sequences` each of `names` that may rest can draft: bool [S]."""
        found = {}
        for name in names:
            if name in self._resting:
                found[name] = np.zeros(len(sequences), bool) if self.rests(name) else self._resting[name].follows(sequences)
        return found

    def observe(self, progress: Progress) -> None:
        """Hands hidden states to the drafters that asked for them; those that rested at that step hear what they missed."""
        for name, drafter in self._drafters.items():
            if not drafter.taps:
                continue
            if name in self._resting and (self.rests(name) or not progress.taps.keys() >= set(drafter.taps)):
                self._resting[name].miss(progress)
            else:
                self._show(name, drafter, progress)
        if self.listener is not None:
            self.listener.observe(progress)

    def copy(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """See `Rests.copy`."""
        for drafter in self._drafters.values():
            kept: object = drafter
            if isinstance(kept, Rests):
                kept.copy(sources, targets)

    def catch_up(self, name: str) -> None:
        """What a drafter was shown and has put off is taken in now: it is to draft."""
        drafter: object = self._drafters[name]
        if isinstance(drafter, PutsOff) and (tokens := drafter.backlog):
            started = self._clock()
            drafter.catch_up()
            self._learn_intake(name, tokens, self._clock() - started)

    def shown(self, sequences: list[Sequence], answers: float) -> dict[str, float]:
        """How many tokens those that may rest take in for each of the `answers` tokens of the answers of `sequences`, prompts included."""
        found = {}
        for name, drafter in self._resting.items():
            window = drafter.prompt_window if isinstance(drafter, PutsOff) else None
            computed = (sequence.prompt_length - sequence.ledger.cached for sequence in sequences)
            prompts = sum(max(count if window is None else min(count, window), 0) for count in computed)
            found[name] = 1.0 + prompts / max(answers, 1.0)
        return found

    def _show(self, name: str, drafter: Drafter, progress: Progress) -> None:
        started = self._clock()
        drafter.observe(progress)
        backlog = drafter.backlog if isinstance(drafter, PutsOff) else 0
        if not backlog:
            self._learn_intake(name, int(progress.valid.sum()), self._clock() - started)
        elif backlog >= _BACKLOG:
            self.catch_up(name)

    def _learn_intake(self, name: str, tokens: int, nanoseconds: int) -> None:
        self._choices.learn_intake(name, tokens, nanoseconds * 1e-9 / self._cost.slowness)

    def finish(self, names: Iterable[str], sequence: Sequence, *, complete: bool) -> None:
        """A sequence ended that `names` could draft for."""
        if self.listener is not None:
            self.listener.finish(sequence, complete=complete)
        for name in names:
            if name in self._drafters:
                self._drafters[name].finish(sequence, complete=complete)
