"""Drafting for a step: asks each request's drafter, and weighs survival against cost."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from engine.drafters.base import Blocks, DraftBatch, Drafts, DraftsOnDevice, Remembers
from engine.drafters.builtin import PORTFOLIO, TEXT
from engine.speculation.choices import Choices
from engine.speculation.cost_model import CostModel, Load
from engine.speculation.forced import FORCED, ForcedDrafts, without
from engine.speculation.loaded_drafters import LoadedDrafters
from engine.speculation.planner import FixedLength, Planner, StepCost, token_weights
from engine.speculation.portfolio import FULL, net
from engine.speculation.proposal import Proposal
from engine.speculation.track_record import TrackRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from numpy.typing import NDArray

    from engine.drafters.base import Listener, Progress
    from engine.drafters.builtin import Supply
    from engine.logit_rules import Constraint
    from engine.sequence import Sequence
    from engine.speculation.experience import Records
    from engine.speculation.planner import DraftPolicy
    from engine.speculation.portfolio import Portfolio

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

_LOOK_EVERY = 32
"""Steps after which drafters are asked even where no draft can pay, so that the calibration goes on learning."""
_QUIET, _SELDOM = 8, 4
"""In full steps, a request none of whose drafts was verified in so many steps is asked for drafts every so many steps."""
_FEW = 4
"""Drafts of each request at which the price of one is taken."""
_CHAIN = 0.3
"""Chance that a whole block stands from which on another one is drafted behind it: that takes as long again."""


class Speculator:
    """One per engine. Drafters come into being when a request first uses them, out of `supply`.

    `fixed_drafts`: verify that many of every request's drafts instead of what the planner finds to pay. records: where what was learned of
    drafters outlasts this engine. clock: nanoseconds, by which drafters are timed.
    """

    def __init__(
        self,
        max_draft_tokens: int,
        max_sequences: int,
        cost: CostModel,
        supply: Supply,
        *,
        fixed_drafts: int | None = None,
        records: Records | None = None,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._max_draft = max_draft_tokens
        self._cost = cost
        self._supply = supply
        self._policy: DraftPolicy = Planner() if fixed_drafts is None else FixedLength(fixed_drafts)
        self._selective = fixed_drafts is None
        """Whether a request may be left without drafts; a policy that always drafts asks nobody's choice."""
        self._record = TrackRecord(max_sequences)
        tags = {name: supply.tags(name) for name in supply.members[1:]}
        self._choices = Choices(tags, max_sequences, selective=self._selective, records=records)
        self._drafters = LoadedDrafters(supply, self._choices, self._record, cost, selective=self._selective, clock=clock)
        self._clock = clock
        self._quiet = np.zeros(max_sequences, np.int64)
        """Steps since a draft of the request in a slot was chosen."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Hidden-state indices that the drafters in use want in the next step."""
        return self._drafters.taps

    @property
    def cost(self) -> CostModel:
        """What it knows of this machine."""
        return self._cost

    def foresee(self, count: int, running: list[Sequence], answers: float) -> None:
        """How many sequences will decode together once those that wait have started, like the `running` ones, whose answers will probably
        have so many tokens together.

        Where steps are then so full that a draft hardly pays, or drafts would not bring in what it costs to follow the texts, drafters of
        hidden states need not be shown any: that costs time in every step. What is computed meanwhile they will never have seen.
        """
        self._drafters.crowded = False
        if count and running and self._cost.ready and self._drafters.may_rest:
            kv_tokens = count * sum(sequence.num_tokens for sequence in running) // len(running)
            cost = StepCost.of(self._cost, decoding=count, prefill=0, kv_tokens=kv_tokens, drafts=_FEW * count)
            self._drafters.crowded = _price(cost, count) >= FULL
            pace = float(self._record.paces(np.array([sequence.slot for sequence in running], np.int64)).mean())
            shown = {name: pace * tokens for name, tokens in self._drafters.shown(running, answers).items()}
            self._choices.foresee(count, self._speed(cost, count), shown)

    def keep(self) -> None:
        """What was learned of drafters outlasts this engine, where there is a place for it."""
        self._choices.keep()

    def start(self, name: str, slot: int) -> None:
        """A sequence that uses drafter `name` takes `slot`. Raises ValueError where the drafter does not fit the target."""
        members = self._members(name)
        for member in members:
            self._drafters.load(member)
        self._record.enter(slot, members)
        self._quiet[slot] = 0
        if (choice := self._choices.of(name)) is not None:
            choice.enter(slot)

    def listen(self, listener: Listener | None) -> None:
        """Shows `listener` the hidden states of every step, and every sequence that ends."""
        self._drafters.listener = listener

    def exchange(self, name: str, tensors: dict[str, torch.Tensor]) -> bool:
        """Drafter `name` goes on with other weights; False where it is not in use. Its record weighs less from now on."""
        if name not in self._drafters:
            return False
        self._drafters.exchange(name, tensors)
        self._choices.forget(name)
        return True

    def add(self, name: str) -> None:
        """`name` takes part in the portfolio from the next step on, or drafts anew where it did already.

        Raises DrafterError, ValueError or OSError where it cannot be made; nothing has changed then.
        """
        drafter = self._supply.create(name)
        self.remove(name)
        self._drafters.keep(name, drafter)
        self._choices.add(name, self._supply.tags(name))

    def drafts(self, name: str) -> bool:
        """Whether it takes part in the portfolio."""
        return name in self._choices.portfolio.neural

    def remove(self, name: str) -> None:
        """Takes a drafter out of the portfolio and unloads it; a request that asked for it by name gets it again."""
        self._choices.remove(name)
        self._drafters.remove(name)

    def finish(self, name: str, sequence: Sequence, *, complete: bool) -> None:
        self._drafters.finish(self._members(name), sequence, complete=complete)

    def observe_finished(self, template: str | None, tokens: list[int]) -> None:
        """An answer that was finished elsewhere: the lookup over the job takes it in."""
        self._drafters.load(TEXT)
        lookup = self._drafters[TEXT]
        if isinstance(lookup, Remembers):
            lookup.remember(template, tokens)

    def let_go(self) -> list[str]:
        """Unloads the drafters of the portfolio that do not pay; returns their names."""
        gone = self._choices.portfolio.let_go()
        for name in gone:
            self.remove(name)
            self._supply.retire(name)
        return gone

    def _members(self, name: str) -> tuple[str, ...]:
        return (TEXT, *self._choices.portfolio.neural) if name == PORTFOLIO else (name,)

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
                self._drafters.load(name)  # the portfolio may have let go of what a request asked for by name
            if (choice := self._choices.of(name)) is not None:
                self._ask_choice(choice, name, rows, sequences, limits, step, proposal, cost, weights[rows])
            else:
                self._take(name, rows, self._ask(name, rows, sequences, limits, step, proposal), sequences, proposal)
        if forced is not None and len(rows := forced.merge(proposal)):
            proposal.survival[rows] = self._record.survival(FORCED, slots[rows], proposal.bins[rows])
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
        readers = self._drafters.readers
        if len(readers) != 1 or not self._selective or self._drafters.listener is not None or not self._cost.ready:
            return None
        (name,) = readers
        allowed = {name, PORTFOLIO} if name in self._choices.portfolio.neural else {name}
        drafter: object = self._drafters[name]
        if not names <= allowed or not isinstance(drafter, DraftsOnDevice) or drafter.drafts_per_pass > self._max_draft:
            return None
        return name, drafter

    def foretell(self, name: str, slots: Ints, bins: Ints) -> Floats:
        """See `TrackRecord.survival`."""
        return self._record.survival(name, slots, bins)

    def trust(self, name: str, slots: Ints) -> tuple[Floats, Floats]:
        """See `TrackRecord.trust`."""
        return self._record.trust(name, slots)

    def weights(self, sequences: list[Sequence], remaining: Floats | None) -> Floats:
        """float64 [S]: what a token of each is worth in the next step; see `token_weights`."""
        return self._weights(sequences, remaining, self._step_cost(sequences, 0))

    def late(self, name: str, sequences: list[Sequence], token_ids: Ints, bins: Ints, drafted: Ints, verified: Ints) -> Proposal:
        """What was drafted and verified in a step on the device, as if it had been proposed here.

        Of sequences that have left their slots nothing is learned.
        """
        slots = np.array([sequence.slot for sequence in sequences], np.int64)
        bins = np.where(np.arange(bins.shape[1]) < drafted[:, None], bins, -1)
        survival = self._record.survival(name, slots, bins)
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
        """Learns from a verified step; see `TrackRecord.settle`."""
        self._record.settle(proposal, sequences, accepted, following, self._choices)

    def observe(self, progress: Progress) -> None:
        """Hands hidden states to the drafters that asked for them; those that rested at that step hear what they missed."""
        self._drafters.observe(progress)

    def copy(self, sources: Ints, targets: Ints) -> None:
        """Tells drafters of hidden states that the KV of these slots was copied to those."""
        self._drafters.copy(sources, targets)

    def learn_cost(self, load: Load, seconds: float) -> None:
        self._cost.observe(load, seconds)

    def _ask(self, name: str, rows: Ints, sequences: list[Sequence], limits: Ints, step: int, proposal: Proposal) -> Drafts:
        """Drafts of one drafter for some rows; its time is theirs."""
        started = self._clock()
        drafter = self._drafters[name]
        self._drafters.catch_up(name)
        taken_in = self._clock()
        wanted = limits[rows]
        if drafter.taps:
            wanted = np.minimum(wanted, self._record.depth(name))
        if self._selective and isinstance(drafter, Blocks) and self._record.whole(name) < _CHAIN:
            wanted = np.minimum(wanted, drafter.drafts_per_pass)
        drafts = drafter.propose(DraftBatch([sequences[row] for row in rows], wanted, step))
        elapsed = self._clock() - started
        self._choices.learn_seconds(name, len(rows), (started + elapsed - taken_in) * 1e-9 / self._cost.slowness)
        each, rest = divmod(elapsed, len(rows))
        proposal.nanoseconds[rows] += each
        proposal.nanoseconds[rows[:rest]] += 1
        proposal.passes.append((name, len(rows), elapsed))
        return drafts

    def _take(self, name: str, rows: Ints, drafts: Drafts, sequences: list[Sequence], proposal: Proposal) -> None:
        """Makes `drafts` the ones of these rows."""
        width = drafts.token_ids.shape[1]
        proposal.token_ids[rows, :width] = drafts.token_ids
        proposal.bins[rows, :width] = drafts.bins
        proposal.drafted[rows] = drafts.lengths
        proposal.survival[rows, :width] = self._survival(name, rows, drafts, sequences)
        drafter = self._drafters[name]
        if isinstance(drafter, Blocks):
            self._record.learn_blocks(name, drafter.drafts_per_pass, drafts.lengths, proposal.survival[rows])
        if drafts.probabilities is not None:
            proposal.probabilities.append((rows, drafts.probabilities))
        proposal.groups.append((name, rows))

    def _survival(self, name: str, rows: Ints, drafts: Drafts, sequences: list[Sequence]) -> Floats:
        slots = np.array([sequences[row].slot for row in rows], np.int64)
        return self._record.survival(name, slots, drafts.bins)

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
        tokens_per_second = self._speed(cost, len(sequences))
        price = _price(cost, len(sequences))
        lookup, promised = None, np.zeros(len(rows))
        if asked == PORTFOLIO:
            lookup = self._ask(TEXT, rows, sequences, limits, step, proposal)
            promised = net(self._survival(TEXT, rows, lookup, sequences) * weights[:, None], price)
        slots = np.array([sequences[row].slot for row in rows], np.int64)
        templates = [sequences[row].request.template for row in rows]
        names: list[str | None] = [None] * len(rows)
        # In a crowd none of those that rest can draft, and how they would do there is no news of them.
        awake = any(not (self._drafters.crowded and self._drafters.rests(name)) for name in choice.neural)
        if awake and int(limits[rows].max(initial=0)) > 1:
            follows = self._drafters.follows(choice.neural, [sequences[row] for row in rows])
            names = choice.choose(slots, templates, promised, tokens_per_second, price, follows, weights)
        for name in (None, *choice.neural):
            places = np.array([place for place, chosen in enumerate(names) if chosen == name], np.int64)
            if not len(places):
                continue
            if name is None:
                if lookup is not None:
                    self._take(TEXT, rows[places], lookup.rows(places), sequences, proposal)
                continue
            drafts = self._ask(name, rows[places], sequences, limits, step, proposal)
            self._take(name, rows[places], drafts, sequences, proposal)
            if lookup is not None:
                proposal.shadows.append((TEXT, rows[places], lookup.rows(places)))

    def _speed(self, cost: StepCost, count: int) -> float:
        """Tokens a second of a step of `count` sequences without drafts, were the machine as it usually is. So are a drafter's times: what
        slows it slows steps as well, and they may be of another day.
        """
        return count * self._cost.slowness / max(cost.decoding, 1e-9)

    def _weights(self, sequences: list[Sequence], remaining: Floats | None, cost: StepCost) -> Floats:
        """See `token_weights`; steps left at each one's pace of lately."""
        slots = np.array([sequence.slot for sequence in sequences], np.int64)
        return token_weights(None if remaining is None else remaining / self._record.paces(slots), len(sequences), cost)


def _price(cost: StepCost, count: int) -> float:
    """Of a draft's verification, in tokens that its time brings otherwise, in a step of `count` sequences."""
    return cost.per_draft(_FEW * count) * count / max(cost.decoding, 1e-9)
