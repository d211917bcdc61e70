"""Drafting for a step: asks each request's drafter, weighs survival against cost, and learns from what came of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from engine.drafters.base import Blocks, DraftBatch, Drafts, DraftsOnDevice, Exchangeable, Progress, Remembers, Rests
from engine.drafters.builtin import PORTFOLIO, TEXT, TEXT_DRAFTERS
from engine.speculation.calibration import Calibration, Discount
from engine.speculation.cost_model import CostModel, Load
from engine.speculation.forced import FORCED, PRIOR, ForcedDrafts, without
from engine.speculation.planner import FixedLength, Planner, StepCost, token_weights
from engine.speculation.portfolio import FULL, Portfolio, earned, net

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from engine.drafters.base import Drafter, Listener
    from engine.drafters.builtin import Supply
    from engine.logit_rules import Constraint
    from engine.sequence import Sequence
    from engine.speculation.planner import DraftPolicy

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

_DEPTH_MEMORY = 0.8
_LOOK_EVERY = 32
"""Steps after which drafters are asked even where no draft can pay, so that the calibration goes on learning."""
_QUIET, _SELDOM = 8, 4
"""In full steps, a request none of whose drafts was verified in so many steps is asked for drafts every so many steps."""
_FEW = 4
"""Drafts of each request at which the price of one is taken."""
_CHAIN = 0.3
"""Chance that a whole block stands from which on another one is drafted behind it: that takes as long again."""
_PACE = 0.9
"""How much of a request's pace (tokens a step) is what it was the step before."""
_FIRST_DEPTH = 8
"""Draft tokens a request at first; then a little more than what was lately verified."""


@dataclass(slots=True)
class Proposal:
    """Drafts of S sequences. `token_ids` [S, D] and `bins` [S, D] hold `drafted[s]` drafts; the first `chosen[s]` are to be verified.

    `survival`: float64 [S, D], the chance that drafts 0..j all stand. `nanoseconds`: int64 [S]. `groups`: (drafter name, rows of its
    sequences). `probabilities`: (rows, [rows, D', vocab]) of random drafts. `shadows`: (drafter, rows, drafts) that were not taken, to
    be held against what the step confirms.
    """

    token_ids: Ints
    bins: Ints
    drafted: Ints
    chosen: Ints
    nanoseconds: Ints
    survival: Floats
    groups: list[tuple[str, Ints]] = field(default_factory=list)
    shadows: list[tuple[str, Ints, Drafts]] = field(default_factory=list)
    probabilities: list[tuple[Ints, torch.Tensor]] = field(default_factory=list)

    @staticmethod
    def empty(count: int) -> Proposal:
        nothing = np.zeros((count, 0), np.int64)
        drafted, chosen, nanoseconds = np.zeros((3, count), np.int64)
        return Proposal(nothing, nothing, drafted, chosen, nanoseconds, np.zeros((count, 0)))

    def tokens(self, row: int) -> Ints:
        """The drafts of one sequence that are to be verified."""
        return self.token_ids[row, : self.chosen[row]]


class Speculator:
    """One per engine. Drafters come into being when a request first uses them, out of `supply`.

    `fixed_drafts`: verify that many of every request's drafts instead of what the planner finds to pay.
    """

    def __init__(
        self, max_draft_tokens: int, max_sequences: int, cost: CostModel, supply: Supply, *, fixed_drafts: int | None = None
    ) -> None:
        self._max_draft = max_draft_tokens
        self._max_sequences = max_sequences
        self._cost = cost
        self._supply = supply
        self._policy: DraftPolicy = Planner() if fixed_drafts is None else FixedLength(fixed_drafts)
        self._portfolio = Portfolio({name: supply.tags(name) for name in supply.members[1:]}, max_sequences)
        self._alone: dict[str, Portfolio] = {}
        """Of drafters that requests name: the choice there is between them and no drafts. A policy that always drafts needs none."""
        self._selective = fixed_drafts is None
        self._depths: dict[str, float] = {}
        self._ends: dict[str, float] = {}
        self._drafters: dict[str, Drafter] = {}
        self._resting: dict[str, Rests] = {}
        """Those of them that may rest."""
        self._calibrations: dict[str, Calibration] = {FORCED: Calibration(PRIOR, max_sequences)}
        self._discounts: dict[str, Discount] = {FORCED: Discount()}
        self._listener: Listener | None = None
        self._crowded = False
        self._paces = np.ones(max_sequences)
        self._quiet = np.zeros(max_sequences, np.int64)
        """Steps since a draft of the request in a slot was chosen."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Hidden-state indices that the drafters in use want in the next step."""
        wanted = {tap for name, drafter in self._drafters.items() if not self._rests(name) for tap in drafter.taps}
        return tuple(sorted(wanted if self._listener is None else wanted.union(self._listener.taps)))

    @property
    def cost(self) -> CostModel:
        """What it knows of this machine."""
        return self._cost

    def foresee(self, count: int, context: float) -> None:
        """How many sequences will decode together once those that wait have started, after how many tokens each (mean).

        Where steps are then so full that a draft hardly pays, drafters of hidden states need not be shown any: that costs time in every
        step. What is computed meanwhile they will never have seen.
        """
        self._crowded = False
        if count and self._cost.ready and self._resting:
            kv_tokens = int(count * context)
            cost = StepCost.of(self._cost, decoding=count, prefill=0, kv_tokens=kv_tokens, drafts=_FEW * count)
            self._crowded = _price(cost, count) >= FULL

    def start(self, name: str, slot: int) -> None:
        """A sequence that uses drafter `name` takes `slot`. Raises ValueError where the drafter does not fit the target."""
        for member in self._members(name):
            self._ensure(member)
            self._calibrations[member].reset(slot)
        self._calibrations[FORCED].reset(slot)
        self._paces[slot], self._quiet[slot] = 1.0, 0
        if (choice := self._choice(name)) is not None:
            choice.enter(slot)

    def listen(self, listener: Listener | None) -> None:
        """Shows `listener` the hidden states of every step, and every sequence that ends."""
        self._listener = listener

    def exchange(self, name: str, tensors: dict[str, torch.Tensor]) -> bool:
        """Drafter `name` goes on with other weights; False where it is not in use. Its record weighs less from now on."""
        if name not in self._drafters:
            return False
        drafter: object = self._drafters[name]
        if not isinstance(drafter, Exchangeable):
            raise TypeError(f"the weights of {name} cannot be exchanged")
        drafter.exchange(tensors)
        for choice in (self._portfolio, *self._alone.values()):
            choice.forget(name)
        return True

    def add(self, name: str) -> None:
        """`name` takes part in the portfolio from the next step on, or drafts anew where it did already.

        Raises DrafterError, ValueError or OSError where it cannot be made; nothing has changed then.
        """
        drafter = self._supply.create(name)
        self.remove(name)
        self._keep(name, drafter)
        self._portfolio.add(name, self._supply.tags(name))

    def drafts(self, name: str) -> bool:
        """Whether it takes part in the portfolio."""
        return name in self._portfolio.neural

    def remove(self, name: str) -> None:
        """Takes a drafter out of the portfolio and unloads it; a request that asked for it by name gets it again."""
        self._portfolio.remove(name)
        for known in (self._drafters, self._resting, self._calibrations, self._discounts, self._depths, self._ends, self._alone):
            known.pop(name, None)

    def finish(self, name: str, sequence: Sequence, *, complete: bool) -> None:
        if self._listener is not None:
            self._listener.finish(sequence, complete=complete)
        for member in self._members(name):
            if member in self._drafters:
                self._drafters[member].finish(sequence, complete=complete)

    def observe_finished(self, template: str | None, tokens: list[int]) -> None:
        """An answer that was finished elsewhere: the lookup over the job takes it in."""
        self._ensure(TEXT)
        lookup = self._drafters[TEXT]
        if isinstance(lookup, Remembers):
            lookup.remember(template, tokens)

    def let_go(self) -> list[str]:
        """Unloads the drafters of the portfolio that do not pay; returns their names."""
        gone = self._portfolio.let_go()
        for name in gone:
            self.remove(name)
            self._supply.retire(name)
        return gone

    def _ensure(self, name: str) -> None:
        if name not in self._drafters:
            self._keep(name, self._supply.create(name))

    def _keep(self, name: str, drafter: Drafter) -> None:
        self._drafters[name] = drafter
        if self._selective and isinstance(drafter, Rests):
            self._resting[name] = drafter
        self._calibrations[name] = Calibration(drafter.prior, self._max_sequences)
        self._discounts[name] = Discount()

    def _choice(self, name: str) -> Portfolio | None:
        """What decides whether drafter `name`, or which of the portfolio's, drafts for a request that asks for it."""
        if name == PORTFOLIO:
            return self._portfolio
        if self._selective and name not in TEXT_DRAFTERS and name not in self._alone:
            self._alone[name] = Portfolio({name: ()}, self._max_sequences)
        return self._alone.get(name)

    def _members(self, name: str) -> tuple[str, ...]:
        return (TEXT, *self._portfolio.neural) if name == PORTFOLIO else (name,)

    def propose(
        self,
        sequences: list[Sequence],
        names: list[str | None],
        *,
        step: int,
        prefill: int,
        budget: int,
        remaining: Floats | None = None,
        constraints: list[Constraint | None] | None = None,
    ) -> Proposal:
        """Drafts for decoding `sequences` (names: their drafters), and how many of each to verify, `budget` in all at most.

        remaining: float64 [S], tokens that each probably goes on for, where nobody waits for their places; None: somebody does.
        constraints: what holds the sequences to a form, one a sequence; None: nothing holds any.
        """
        proposal = Proposal.empty(len(sequences))
        wanted = {name for name in names if name is not None}
        if not wanted or budget <= 0 or not self._cost.ready:
            return proposal
        kv_tokens = sum(sequence.num_tokens for sequence in sequences)
        most = min(budget, self._max_draft * len(sequences))
        cost = StepCost.of(self._cost, decoding=len(sequences), prefill=prefill, kv_tokens=kv_tokens, drafts=most)
        weights = self._weights(sequences, remaining, cost)
        limits = self._policy.limits(weights, cost, self._max_draft)
        if step % _LOOK_EVERY == 0:
            limits = np.maximum(limits, 1)
        limits = np.minimum(limits, np.array([sequence.room - 1 for sequence in sequences], np.int64))
        slots = np.array([sequence.slot for sequence in sequences], np.int64)
        self._quiet[slots] += 1
        if self._selective and _price(cost, len(sequences)) >= FULL:
            limits[(self._quiet[slots] > _QUIET) & ((step + slots) % _SELDOM != 0)] = 0
        if not limits.any():
            return proposal
        proposal.survival = np.zeros((len(sequences), self._max_draft))
        proposal.token_ids = np.zeros((len(sequences), self._max_draft), np.int64)
        proposal.bins = np.full((len(sequences), self._max_draft), -1, np.int64)
        forced = None if constraints is None else ForcedDrafts(constraints, sequences, names, limits)
        if forced is not None:
            names = forced.others(names)
            wanted = {name for name in names if name is not None}
        for name in sorted(wanted):
            rows = np.array([row for row, other in enumerate(names) if other == name], np.int64)
            if name != PORTFOLIO:
                self._ensure(name)  # the portfolio may have let go of what a request asked for by name
            if (choice := self._choice(name)) is not None:
                self._ask_choice(choice, name, rows, sequences, limits, step, proposal, cost, weights[rows])
            else:
                self._take(name, rows, self._ask(name, rows, sequences, limits, step, proposal), sequences, proposal)
        if forced is not None and len(rows := forced.merge(proposal)):
            proposal.survival[rows] = self._calibrations[FORCED].survival(slots[rows], proposal.bins[rows]) * self._discounts[FORCED].factor
            proposal.groups = [*without(proposal.groups, rows), (FORCED, rows)]
        proposal.chosen = self._policy.choose(proposal.survival * weights[:, None], cost, random=bool(proposal.probabilities))
        self._quiet[slots[proposal.chosen > 0]] = 0
        if forced is not None:
            forced.trim(proposal)
        return proposal

    def idle(self, sequences: list[Sequence], names: list[str | None], *, step: int, prefill: int, remaining: Floats | None = None) -> bool:
        """Whether drafts could be left out of the next step: nobody wants any, or none would pay, however good they were.

        Asked before the last tokens of `sequences` are known, without which nobody can draft. The rest: as in `propose`.
        """
        if not sequences or not self._cost.ready or all(name is None for name in names):
            return True
        if step % _LOOK_EVERY == 0:
            return False
        kv_tokens = sum(sequence.num_tokens for sequence in sequences)
        most = self._max_draft * len(sequences)
        cost = StepCost.of(self._cost, decoding=len(sequences), prefill=prefill, kv_tokens=kv_tokens, drafts=most)
        return not self._policy.limits(self._weights(sequences, remaining, cost), cost, self._max_draft).any()

    def on_device(self, names: set[str | None]) -> tuple[str, DraftsOnDevice] | None:
        """The drafter that could draft inside the steps of requests that use `names`: the only one here that reads hidden states.

        None where nobody may, or how many drafts are made or verified was asked for.
        """
        readers = [name for name, drafter in self._drafters.items() if drafter.taps]
        if len(readers) != 1 or not self._selective or self._listener is not None or not self._cost.ready:
            return None
        (name,) = readers
        allowed = {name, PORTFOLIO} if name in self._portfolio.neural else {name}
        drafter: object = self._drafters[name]
        if not names <= allowed or not isinstance(drafter, DraftsOnDevice) or drafter.drafts_per_pass > self._max_draft:
            return None
        return name, drafter

    def trust(self, name: str, slots: Ints) -> tuple[Floats, Floats]:
        """What drafter `name`'s confidence is worth: by bin, and in the requests of `slots`; see `Calibration`."""
        return self._calibrations[name].rates, self._calibrations[name].own(slots)

    def weights(self, sequences: list[Sequence], remaining: Floats | None) -> Floats:
        """float64 [S]: what a token of each is worth in the next step; see `token_weights`."""
        return self._weights(sequences, remaining, self._step_cost(sequences, 0))

    def late(self, name: str, sequences: list[Sequence], token_ids: Ints, bins: Ints, drafted: Ints, verified: Ints) -> Proposal:
        """What was drafted and verified in a step on the device, as if it had been proposed here.

        Of sequences that have left their slots nothing is learned.
        """
        slots = np.array([sequence.slot for sequence in sequences], np.int64)
        bins = np.where(np.arange(bins.shape[1]) < drafted[:, None], bins, -1)
        survival = self._calibrations[name].survival(slots, bins) * self._discounts[name].factor
        rows = np.flatnonzero((slots >= 0) & (drafted > 0))
        groups = [(name, rows)] if len(rows) else []
        return Proposal(token_ids, bins, drafted, verified, np.zeros_like(drafted), survival, groups)

    def capacity(self, proposal: Proposal, sequences: list[Sequence], weights: Floats) -> int:
        """How many of a step's drafts would have been worth verifying: for the steps after it, where none is drawn yet."""
        cost = self._step_cost(sequences, proposal.survival.shape[1] * len(sequences))
        return int(self._policy.choose(proposal.survival * weights[:, None], cost, random=False).sum())

    def _step_cost(self, sequences: list[Sequence], drafts: int) -> StepCost:
        """Of a step in which these decode and nothing else happens."""
        kv_tokens = sum(sequence.num_tokens for sequence in sequences)
        return StepCost.of(self._cost, decoding=len(sequences), prefill=0, kv_tokens=kv_tokens, drafts=drafts)

    def settle(self, proposal: Proposal, sequences: list[Sequence], accepted: Ints, following: Ints) -> None:
        """Learns from a verified step. accepted: int64 [S]; following: int64 [S], the target's token after the accepted ones."""
        slots = np.array([sequence.slot for sequence in sequences], np.int64)
        self._paces[slots] = _PACE * self._paces[slots] + (1.0 - _PACE) * (1.0 + accepted)
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
        for name, members in proposal.groups:
            if name not in self._calibrations:
                continue
            self._calibrations[name].observe(slots[members], proposal.bins[members], stood[members], seen[members])
            self._learn_depth(name, proposal.chosen[members])
            discount = self._discounts[name]
            discount.observe(_promised(proposal, members) / discount.factor, float(accepted[members].sum()))
            templates = [sequences[row].request.template for row in members]
            brought = earned(proposal.survival[members], _stood(proposal, members, accepted))
            for choice in (self._portfolio, *self._alone.values()):
                choice.learn(name, slots[members], templates, brought)
        for name, members, drafts in proposal.shadows:
            matched, known = _matches(drafts, proposal, members, accepted, following)
            self._calibrations[name].observe(slots[members], drafts.bins, matched, np.minimum(matched + 1, known))

    def observe(self, progress: Progress) -> None:
        """Hands hidden states to the drafters that asked for them; those that rested at that step hear what they missed."""
        for name, drafter in self._drafters.items():
            if not drafter.taps:
                continue
            if name in self._resting and (self._rests(name) or not progress.taps.keys() >= set(drafter.taps)):
                self._resting[name].miss(progress)
            else:
                drafter.observe(progress)
        if self._listener is not None:
            self._listener.observe(progress)

    def _rests(self, name: str) -> bool:
        """Whether a drafter is not to be shown hidden states now."""
        if name not in self._resting:
            return False
        return self._crowded or not any(choice.attends(name) for choice in (self._portfolio, *self._alone.values()))

    def learn_cost(self, load: Load, seconds: float) -> None:
        self._cost.observe(load, seconds)

    def _ask(self, name: str, rows: Ints, sequences: list[Sequence], limits: Ints, step: int, proposal: Proposal) -> Drafts:
        """Drafts of one drafter for some rows; its time is theirs."""
        started = time.perf_counter_ns()
        drafter = self._drafters[name]
        wanted = limits[rows]
        if drafter.taps:
            wanted = np.minimum(wanted, self._depth(name))
        if self._selective and isinstance(drafter, Blocks) and self._ends.get(name, 0.0) < _CHAIN:
            wanted = np.minimum(wanted, drafter.drafts_per_pass)
        drafts = drafter.propose(DraftBatch([sequences[row] for row in rows], wanted, step))
        elapsed = time.perf_counter_ns() - started
        for choice in (self._portfolio, *self._alone.values()):
            choice.learn_seconds(name, len(rows), elapsed * 1e-9)
        each, rest = divmod(elapsed, len(rows))
        proposal.nanoseconds[rows] += each
        proposal.nanoseconds[rows[:rest]] += 1
        return drafts

    def _take(self, name: str, rows: Ints, drafts: Drafts, sequences: list[Sequence], proposal: Proposal) -> None:
        """Makes `drafts` the ones of these rows."""
        width = drafts.token_ids.shape[1]
        proposal.token_ids[rows, :width] = drafts.token_ids
        proposal.bins[rows, :width] = drafts.bins
        proposal.drafted[rows] = drafts.lengths
        proposal.survival[rows, :width] = self._survival(name, rows, drafts, sequences)
        self._learn_ends(name, drafts.lengths, proposal.survival[rows])
        if drafts.probabilities is not None:
            proposal.probabilities.append((rows, drafts.probabilities))
        proposal.groups.append((name, rows))

    def _survival(self, name: str, rows: Ints, drafts: Drafts, sequences: list[Sequence]) -> Floats:
        slots = np.array([sequences[row].slot for row in rows], np.int64)
        return self._calibrations[name].survival(slots, drafts.bins) * self._discounts[name].factor

    def _ask_choice(
        self,
        choice: Portfolio,
        asked: str,
        rows: Ints,
        sequences: list[Sequence],
        limits: Ints,
        step: int,
        proposal: Proposal,
        cost: StepCost,
        weights: Floats,
    ) -> None:
        """The portfolio's lookup is asked for all; who drafts is then chosen, and only then may a neural drafter draw anything."""
        tokens_per_second = len(sequences) / max(cost.decoding, 1e-9)
        price = _price(cost, len(sequences))
        lookup, promised = None, np.zeros(len(rows))
        if asked == PORTFOLIO:
            lookup = self._ask(TEXT, rows, sequences, limits, step, proposal)
            promised = net(self._survival(TEXT, rows, lookup, sequences) * weights[:, None], price)
        slots = np.array([sequences[row].slot for row in rows], np.int64)
        templates = [sequences[row].request.template for row in rows]
        names: list[str | None] = [None] * len(rows)
        # In a crowd none of those that rest can draft, and how they would do there is no news of them.
        awake = any(not (self._crowded and self._rests(name)) for name in choice.neural)
        if awake and int(limits[rows].max(initial=0)) > 1:
            follows = self._follows(choice, rows, sequences)
            names = choice.choose(slots, templates, promised, tokens_per_second, price, follows, weights)
        for name in (None, *choice.neural):
            places = np.array([place for place, chosen in enumerate(names) if chosen == name], np.int64)
            if not len(places):
                continue
            if name is None:
                if lookup is not None:
                    self._take(TEXT, rows[places], _rows_of(lookup, places), sequences, proposal)
                continue
            drafts = self._ask(name, rows[places], sequences, limits, step, proposal)
            self._take(name, rows[places], drafts, sequences, proposal)
            if lookup is not None:
                proposal.shadows.append((TEXT, rows[places], _rows_of(lookup, places)))

    def _weights(self, sequences: list[Sequence], remaining: Floats | None, cost: StepCost) -> Floats:
        """See `token_weights`; steps left at each one's pace of lately."""
        slots = np.array([sequence.slot for sequence in sequences], np.int64)
        return token_weights(None if remaining is None else remaining / self._paces[slots], len(sequences), cost)

    def _follows(self, choice: Portfolio, rows: Ints, sequences: list[Sequence]) -> dict[str, NDArray[np.bool_]]:
        """For whom of `rows` each drafter that may rest can draft."""
        asked = [sequences[row] for row in rows]
        found = {}
        for name in choice.neural:
            if name in self._resting:
                found[name] = np.zeros(len(rows), bool) if self._rests(name) else self._resting[name].follows(asked)
        return found

    def _depth(self, name: str) -> int:
        return int(np.ceil(self._depths.get(name, _FIRST_DEPTH)))

    def _learn_ends(self, name: str, lengths: Ints, survival: Floats) -> None:
        """How likely a whole block of a drafter is to stand, lately."""
        drafter = self._drafters[name]
        if isinstance(drafter, Blocks) and (whole := lengths >= drafter.drafts_per_pass).any():
            found = float(survival[whole, drafter.drafts_per_pass - 1].mean())
            self._ends[name] = _DEPTH_MEMORY * self._ends.get(name, found) + (1.0 - _DEPTH_MEMORY) * found

    def _learn_depth(self, name: str, chosen: Ints) -> None:
        """Draft no deeper than what is likely to be verified: one more than the deepest of lately."""
        deepest = float(chosen.max(initial=0)) + 1.0
        before = self._depths.get(name, float(_FIRST_DEPTH))
        self._depths[name] = max(deepest, _DEPTH_MEMORY * before + (1.0 - _DEPTH_MEMORY) * deepest)


def _price(cost: StepCost, count: int) -> float:
    """Of a draft's verification, in tokens that its time brings otherwise, in a step of `count` sequences."""
    return cost.per_draft(_FEW * count) * count / max(cost.decoding, 1e-9)


def _rows_of(drafts: Drafts, places: Ints) -> Drafts:
    return Drafts(drafts.token_ids[places], drafts.lengths[places], drafts.bins[places])


def _promised(proposal: Proposal, rows: Ints) -> float:
    """Drafts of these rows that were to be verified and expected to stand."""
    survival = proposal.survival[rows]
    return float(survival[np.arange(survival.shape[1]) < proposal.chosen[rows, None]].sum())


def _stood(proposal: Proposal, rows: Ints, accepted: Ints) -> Floats:
    """float64 [R, D]: whether drafts 0..j of these rows stood; past verified ones that all did, the chance that they would have."""
    survival, chosen = proposal.survival[rows], proposal.chosen[rows]
    column = np.arange(survival.shape[1])
    last = np.where(chosen > 0, survival[np.arange(len(rows)), np.maximum(chosen - 1, 0)], 1.0)
    beyond = np.where((accepted[rows] == chosen)[:, None], survival / np.maximum(last, 1e-9)[:, None], 0.0)
    return np.where(column < accepted[rows, None], 1.0, np.where(column < chosen[:, None], 0.0, beyond))


def _matches(drafts: Drafts, proposal: Proposal, rows: Ints, accepted: Ints, following: Ints) -> tuple[Ints, Ints]:
    """How many leading drafts agree with what a step confirmed (int64 [R]), and how many of them the step decided (int64 [R])."""
    stood, known = np.zeros((2, len(rows)), np.int64)
    for place, row in enumerate(rows.tolist()):
        confirmed = np.append(proposal.token_ids[row, : accepted[row]], following[row])
        count = min(len(confirmed), int(drafts.lengths[place]))
        same = confirmed[:count] == drafts.token_ids[place, :count]
        stood[place] = count if same.all() else int(same.argmin())
        known[place] = count
    return stood, known
