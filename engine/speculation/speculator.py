"""Drafting for a step: asks each request's drafter, weighs survival against cost, and learns from what came of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from engine.drafters import registry
from engine.drafters.base import DraftBatch, Progress
from engine.speculation.calibration import Calibration
from engine.speculation.cost_model import CostModel, Load
from engine.speculation.planner import Planner, StepCost, worth_drafting

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from engine.drafters.base import Drafter
    from engine.sequence import Sequence

    Ints = NDArray[np.int64]


@dataclass(slots=True)
class Proposal:
    """Drafts of S sequences. `token_ids` [S, D] and `bins` [S, D] hold `drafted[s]` drafts; the first `chosen[s]` are to be verified.

    `groups`: (drafter name, rows of its sequences). `probabilities`: (rows, [rows, D', vocab]) of random drafts. `nanoseconds`: int64 [S].
    """

    token_ids: Ints
    bins: Ints
    drafted: Ints
    chosen: Ints
    nanoseconds: Ints
    groups: list[tuple[str, Ints]] = field(default_factory=list)
    probabilities: list[tuple[Ints, torch.Tensor]] = field(default_factory=list)

    @staticmethod
    def empty(count: int) -> Proposal:
        nothing = np.zeros((count, 0), np.int64)
        drafted, chosen, nanoseconds = np.zeros((3, count), np.int64)
        return Proposal(nothing, nothing, drafted, chosen, nanoseconds)

    def tokens(self, row: int) -> Ints:
        """The drafts of one sequence that are to be verified."""
        return self.token_ids[row, : self.chosen[row]]


class Speculator:
    """One per engine. Drafters come into being when a request first uses them."""

    def __init__(self, max_draft_tokens: int, max_sequences: int, cost: CostModel) -> None:
        self._max_draft = max_draft_tokens
        self._max_sequences = max_sequences
        self._cost = cost
        self._planner = Planner()
        self._drafters: dict[str, Drafter] = {}
        self._calibrations: dict[str, Calibration] = {}

    @property
    def taps(self) -> tuple[int, ...]:
        """Hidden-state indices that the drafters in use want."""
        return tuple(sorted({tap for drafter in self._drafters.values() for tap in drafter.taps}))

    @property
    def cost(self) -> CostModel:
        """What it knows of this machine."""
        return self._cost

    def start(self, name: str, slot: int) -> None:
        """A sequence that uses drafter `name` takes `slot`."""
        if name not in self._drafters:
            self._drafters[name] = registry.create(name)
            self._calibrations[name] = Calibration(self._drafters[name].prior, self._max_sequences)
        self._calibrations[name].reset(slot)

    def finish(self, name: str, sequence: Sequence, *, complete: bool) -> None:
        if name in self._drafters:
            self._drafters[name].finish(sequence, complete=complete)

    def propose(self, sequences: list[Sequence], names: list[str | None], *, step: int, prefill: int, budget: int) -> Proposal:
        """Drafts for decoding `sequences` (names: their drafters), and how many of each to verify, `budget` in all at most."""
        proposal = Proposal.empty(len(sequences))
        wanted = {name for name in names if name is not None}
        if not wanted or budget <= 0 or not self._cost.ready:
            return proposal
        kv_tokens = sum(sequence.num_tokens for sequence in sequences)
        most = min(budget, self._max_draft * len(sequences))
        cost = StepCost.of(self._cost, decoding=len(sequences), prefill=prefill, kv_tokens=kv_tokens, drafts=most)
        # Where even certain drafts would not pay, one token each keeps the calibration learning.
        deepest = self._max_draft if worth_drafting(len(sequences), cost) else 1
        limits = np.array([min(deepest, sequence.room - 1) for sequence in sequences], np.int64)
        survival = np.zeros((len(sequences), self._max_draft))
        proposal.token_ids = np.zeros((len(sequences), self._max_draft), np.int64)
        proposal.bins = np.full((len(sequences), self._max_draft), -1, np.int64)
        for name in sorted(wanted):
            rows = np.array([row for row, other in enumerate(names) if other == name], np.int64)
            self._ask(name, rows, sequences, limits, step, proposal, survival)
        proposal.chosen = self._planner.choose(survival, cost, random=bool(proposal.probabilities))
        return proposal

    def settle(self, proposal: Proposal, sequences: list[Sequence], accepted: Ints, following: Ints) -> None:
        """Learns from a verified step. accepted: int64 [S]; following: int64 [S], the target's token after the accepted ones."""
        if not proposal.groups:
            return
        rows = np.arange(len(sequences))
        stood, seen = accepted.copy(), np.minimum(accepted + 1, proposal.chosen)
        # A certain draft that was not verified can still be held against the token that came in its place.
        certain = np.ones(len(sequences), bool)
        for members, _ in proposal.probabilities:
            certain[members] = False
        beyond = certain & (accepted == proposal.chosen) & (proposal.drafted > accepted)
        at = np.minimum(accepted, proposal.token_ids.shape[1] - 1)
        stood[beyond] += proposal.token_ids[rows, at][beyond] == following[beyond]
        seen[beyond] += 1
        slots = np.array([sequence.slot for sequence in sequences], np.int64)
        for name, members in proposal.groups:
            self._calibrations[name].observe(slots[members], proposal.bins[members], stood[members], seen[members])

    def observe(self, progress: Progress) -> None:
        """Hands hidden states to the drafters that asked for them."""
        for drafter in self._drafters.values():
            if drafter.taps:
                drafter.observe(progress)

    def learn_cost(self, load: Load, seconds: float) -> None:
        self._cost.observe(load, seconds)

    def _ask(
        self, name: str, rows: Ints, sequences: list[Sequence], limits: Ints, step: int, proposal: Proposal, survival: NDArray[np.float64]
    ) -> None:
        started = time.perf_counter_ns()
        drafts = self._drafters[name].propose(DraftBatch([sequences[row] for row in rows], limits[rows], step))
        width = drafts.token_ids.shape[1]
        proposal.token_ids[rows, :width] = drafts.token_ids
        proposal.bins[rows, :width] = drafts.bins
        proposal.drafted[rows] = drafts.lengths
        slots = np.array([sequences[row].slot for row in rows], np.int64)
        survival[rows, :width] = self._calibrations[name].survival(slots, drafts.bins)
        if drafts.probabilities is not None:
            proposal.probabilities.append((rows, drafts.probabilities))
        proposal.groups.append((name, rows))
        each, rest = divmod(time.perf_counter_ns() - started, len(rows))
        proposal.nanoseconds[rows] = each
        proposal.nanoseconds[rows[:rest]] += 1
