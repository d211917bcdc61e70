"""Which of several drafters drafts for a request in a step: decided before anything is drawn, by what each earned. No torch, no clock.

A drafter's worth for a request is the number of its drafts that stand per step, less what verifying them costs, learned on verified
trajectories: of the request, of its template, of all, each lending to the former while that is young. What verification costs (the price
of a draft, in tokens that its time would have brought otherwise) changes with the batch, so the worth is kept for a range of prices. The
text lookup costs nothing and is always asked, and its worth is what its matches promise right now: those depend on confirmed text alone.
A neural drafter must be worth more than the lookup by at least the tokens that its own time would have brought otherwise. So no choice
ever reads a token that is not yet admitted; picking the drafter whose *realised* drafts look best would bias the text.

A drafter of hidden states has to be shown the texts before it can be chosen. Its income at this load so far (what the choice of a step
found it to be worth, whether it was able to draft or not) must pay for that, prompts included. It starts from what earlier jobs taught.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from engine.speculation.experience import PRICES, Experience, Mean, load_class, no_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

_FADE = 0.9
"""Per step of a request: its record is about its last ten steps."""
_LEND = 8.0
"""Steps that a template's record counts for in a request's, and the overall record in a template's. Of 1 to 32, 8 to 16 foretell best what
the blocks of SmolLM2-135M's drafter bring next; with 2 a request's luck is taken for merit."""
_OPTIMISM = 0.75
"""Chance that a draft stands if those before it do, before the drafter was ever tried."""
_HOPES = 2.0
"""Steps that this counts for in the overall record."""
_FIRST_PROBE = 32
"""Steps without use after which a drafter is tried for one request; tried in vain, after twice as many, and so on."""
_KNOWN_PROBE = 128
"""The same at first for one that earlier jobs tried."""
_TRIALS = 4
"""Requests that a new drafter drafts for before all may have it: until then its worth is a guess, the first ones' luck is no verdict."""
_FEW, _OF = 2, 8
"""So many of them in a step, or one of so many that decode, if that is more: few enough that a bad one costs little, enough that a crowd
which ends after a few steps had something of a good one."""
_PATIENCE = 512
"""Steps without a single paying use after which a drafter is let go. Steps so full that hardly any draft could pay do not count."""
FULL = 0.5
"""The price of a draft in such steps."""
_AHEAD = 24
"""Steps before a trial in which a drafter must attend to the texts, to have something to draft from."""
_LIGHT = 32.0
"""Steps of a request that the experience of earlier jobs counts for at most."""
_INCOME_FADE, _INCOME_LIGHT = 1.0 - 1.0 / 16, 8.0
"""Per step: income is about the last 16 of them. Of an earlier job it counts for so many at most."""
_OF_ONE = 8
"""Steps that a whole request counts for at most in what lasts: requests that a drafter suits keep it, and would count most."""
_MAX_TEMPLATES = 4096
_KEPT = 0.25
"""Of a drafter's record when its weights are exchanged."""


def net(survival: Floats, price: float) -> Floats:
    """float64 [S]: tokens that verifying every draft that pays brings. survival: float64 [S, D], the chance that drafts 0..j all stand."""
    return np.asarray(np.maximum(survival - price, 0.0).sum(axis=1))


def earned(survival: Floats, stood: Floats) -> Floats:
    """float64 [S, P]: what drafts brought at each of `PRICES`, had those been verified that are likelier to stand than they cost.

    stood: float64 [S, D], whether drafts 0..j all stood, or the chance of it where that is not known.
    """
    return np.asarray(((survival[:, :, None] > PRICES) * (stood[:, :, None] - PRICES)).sum(axis=1))


_HOPE = earned(*(np.cumprod(np.full((1, 16), _OPTIMISM), axis=1),) * 2)[0]


@dataclass(slots=True)
class _Member:
    """overall: over all requests. templates: by name. slots, steps: as `Mean`s have it, by the request's slot: [slots, P], [slots]. whole,
    drafted: the same of all of the request so far. tags: the templates it was made for; none: for all. past: of earlier jobs, this one
    included. income: of this one, by load; see `Experience`. idle: steps since it paid.
    """

    slots: Floats
    steps: Floats
    whole: Floats
    drafted: Ints
    tags: tuple[str, ...]
    past: Experience
    overall: Mean
    income: list[Mean]
    next_probe: int
    templates: dict[str | None, Mean] = field(default_factory=dict)
    attends: bool = True
    changed: bool = False
    """It drafts in another way than what is to be remembered under its name."""
    idle: int = 0

    @staticmethod
    def of(slots: int, tags: tuple[str, ...], past: Experience | None) -> _Member:
        """One that nothing is known of but `past`."""
        known = past is not None and past.brought.weight >= _TRIALS
        past = past or Experience()
        overall, income = past.brought.light(_LIGHT), [mean.light(_INCOME_LIGHT) for mean in past.income]
        probe = _KNOWN_PROBE if known else _FIRST_PROBE
        tokens = np.zeros((2, slots, len(PRICES)))
        return _Member(tokens[0], np.zeros(slots), tokens[1], np.zeros(slots, np.int64), tags, past, overall, income, probe)

    @property
    def tried(self) -> bool:
        return self.overall.weight > _TRIALS - 1  # the older a trial, the less it weighs

    def suits(self, template: str | None) -> bool:
        return not self.tags or template in self.tags

    def fade(self, slots: Ints, share: float) -> None:
        """What is known of the requests in `slots` counts for `share` of what it did."""
        self.slots[slots] *= share
        self.steps[slots] *= share

    def leave(self, slot: int) -> None:
        """The request in a slot is gone."""
        if drafted := int(self.drafted[slot]):
            self.past.add_brought(self.whole[slot] / drafted, min(drafted, _OF_ONE))
        self.slots[slot], self.steps[slot], self.whole[slot], self.drafted[slot] = 0.0, 0.0, 0.0, 0

    def earn(self, requests: int, tokens: float) -> None:
        """A step's choice found it to be worth so many tokens for each of so many requests."""
        self.income[load_class(requests)].add(tokens, _INCOME_FADE)
        if self.tried:  # before, it is a hope
            self.past.add_income(requests, tokens)


class Portfolio:
    """`neural`: the drafters that compete with the lookup, and the templates each is made for. One entry a slot for each of `slots`
    running requests. past: what is known of some of them from earlier jobs.

    A drafter is tried first where its tags name the request's template, or where it has none; elsewhere it has to prove itself in probes.
    """

    def __init__(self, neural: Mapping[str, tuple[str, ...]], slots: int, past: Mapping[str, Experience] | None = None) -> None:
        self._slots = slots
        self._members: dict[str, _Member] = {}
        for name, tags in neural.items():
            self.add(name, tags, (past or {}).get(name))

    @property
    def neural(self) -> tuple[str, ...]:
        return tuple(self._members)

    def add(self, name: str, tags: tuple[str, ...], past: Experience | None = None) -> None:
        """`name` takes part from now on, for requests that run already as well; what a drafter of that name earned before is forgotten."""
        self._members[name] = _Member.of(self._slots, tags, past)

    def remove(self, name: str) -> None:
        self._members.pop(name, None)

    def enter(self, slot: int) -> None:
        """A new request took the slot."""
        for member in self._members.values():
            member.leave(slot)

    def foresee(self, requests: int, tokens_per_second: float, shown: Mapping[str, float]) -> None:
        """So many requests will decode together, at so many tokens a second without neural drafts; a drafter that follows the texts takes
        in `shown` tokens a step and request, its share of the prompts included. One that is not named follows in any case.
        """
        load = load_class(requests)
        for name, tokens in shown.items():
            if (member := self._members.get(name)) is not None and (income := member.income[load]).weight:
                member.attends = float(income.total) / income.weight > member.past.intake.each * tokens * tokens_per_second

    def attends(self, name: str) -> bool:
        """Whether `name` should follow the texts: that pays by what it earned at this load, or it is to be tried soon."""
        member = self._members.get(name)
        return member is not None and (member.attends or member.idle >= member.next_probe - _AHEAD)

    def experience(self) -> dict[str, Experience]:
        """What is worth keeping of each member. Those who run have left."""
        for member in self._members.values():
            for slot in np.flatnonzero(member.drafted).tolist():
                member.leave(slot)
        return {name: member.past for name, member in self._members.items() if member.past.brought.weight and not member.changed}

    def choose(
        self,
        slots: Ints,
        templates: list[str | None],
        lookup: Floats,
        tokens_per_second: float,
        price: float,
        follows: Mapping[str, NDArray[np.bool_]] | None = None,
        weights: Floats | None = None,
    ) -> list[str | None]:
        """Per request the neural drafter that is to draft for it, None for the lookup.

        lookup: float64 [S], tokens that the lookup's drafts bring (see `net`). tokens_per_second: of the step without neural drafts.
        price: of a draft's verification, in tokens. follows: bool [S] by drafter, for whom it can draft; one that is not named can for all.
        weights: float64 [S], see `planner.token_weights` (None: 1 for all); `lookup` counts by them already.
        """
        chosen: list[str | None] = [None] * len(slots)
        if not self._members:
            return chosen
        names = list(self._members)
        weights = np.ones(len(slots)) if weights is None else weights
        members = [self._members[name] for name in names]
        gains = np.stack([self._gains(member, slots, templates, lookup, tokens_per_second, price, weights) for member in members])
        fixed = np.array([member.past.drafting.fixed + member.past.intake.fixed for member in members]) * tokens_per_second
        everyone = np.ones(len(slots), bool)
        able = np.stack([(follows or {}).get(name, everyone) for name in names])
        wanted = _assign(gains, fixed)
        best = wanted if able.all() else _assign(np.where(able, gains, -np.inf), fixed)
        for index, name in enumerate(names):
            rows = np.flatnonzero(best == index)
            member = self._members[name]
            income = gains[index, wanted == index].sum() - fixed[index] if (wanted == index).any() else 0.0
            member.earn(len(slots), float(income) / len(slots))
            if not member.tried:
                rows = rows[np.argsort(-gains[index, rows], kind="stable")[: max(_FEW, len(slots) // _OF)]]
            for row in rows:
                chosen[row] = name
            member.fade(np.delete(slots, rows), _FADE)  # what a request held against it is forgotten, or it could never be corrected
            if len(rows):
                member.idle, member.next_probe = 0, _FIRST_PROBE
            elif price < FULL:
                member.idle += 1
                places = np.flatnonzero(able[index])
                if member.idle >= member.next_probe and len(places):
                    member.next_probe *= 2
                    chosen[places[member.idle % len(places)]] = name
        return chosen

    def learn(self, name: str, slots: Ints, templates: list[str | None], brought: Floats) -> None:
        """What came of `name`'s drafts for some requests: float64 [S, P], see `earned`."""
        member = self._members.get(name)
        if member is None:
            return
        member.fade(slots, _FADE)
        member.slots[slots] += brought
        member.steps[slots] += 1.0
        member.whole[slots] += brought
        member.drafted[slots] += 1
        for template, tokens in zip(templates, brought, strict=True):
            member.overall.add(tokens, 1.0 - (1.0 - _FADE) / 16)
            if template not in member.templates and len(member.templates) >= _MAX_TEMPLATES:
                del member.templates[next(iter(member.templates))]
            member.templates.setdefault(template, no_tokens()).add(tokens, 1.0 - (1.0 - _FADE) / 4)

    def learn_seconds(self, name: str, requests: int, seconds: float) -> None:
        """How long a draft pass of `name` took for so many requests."""
        if member := self._members.get(name):
            member.past.drafting.learn(requests, seconds)

    def learn_intake(self, name: str, tokens: int, seconds: float) -> None:
        """How long it took `name` to take in the hidden states of so many tokens."""
        if member := self._members.get(name):
            member.past.intake.learn(tokens, seconds)

    def let_go(self) -> list[str]:
        """Takes out the drafters that have not paid for long; returns their names."""
        gone = [name for name, member in self._members.items() if member.idle >= _PATIENCE]
        for name in gone:
            del self._members[name]
        return gone

    def forget(self, name: str) -> None:
        """`name` drafts in another way from now on: what it earned before weighs less, so that it is judged anew."""
        if member := self._members.get(name):
            for mean in (member.overall, *member.templates.values()):
                mean.fade(_KEPT)
            member.fade(np.arange(self._slots), _KEPT)
            member.idle, member.next_probe, member.changed = 0, _FIRST_PROBE, True
            member.income = Experience().income

    def _gains(
        self,
        member: _Member,
        slots: Ints,
        templates: list[str | None],
        lookup: Floats,
        tokens_per_second: float,
        price: float,
        weights: Floats,
    ) -> Floats:
        """float64 [S]: tokens a step that it brings more than the lookup, less those that its own time would have brought."""
        brought = weights * self._worth(member, slots, templates, price / np.maximum(weights, 1e-9))
        return np.asarray(brought - lookup - member.past.drafting.each * tokens_per_second, np.float64)

    def _worth(self, member: _Member, slots: Ints, templates: list[str | None], prices: Floats) -> Floats:
        """float64 [S]: tokens a step that its drafts bring each request, where a draft's verification costs `prices` [S]."""
        overall = {
            suits: member.overall.held(_HOPE if suits else np.zeros(len(PRICES)), _HOPES)
            for suits in {member.suits(name) for name in templates}
        }
        kinds: dict[str | None, Floats] = {}
        for template in set(templates):
            everyone, kind = overall[member.suits(template)], member.templates.get(template)
            kinds[template] = everyone if kind is None else kind.held(everyone, _LEND)
        if not member.tried:
            found = np.array([_HOPE if member.suits(name) else 0.0 * _HOPE for name in templates])
        else:
            likely = np.array([kinds[name] for name in templates])
            found = (member.slots[slots] + _LEND * likely) / (member.steps[slots, None] + _LEND)
        place = np.clip((prices - PRICES[0]) / (PRICES[1] - PRICES[0]), 0.0, len(PRICES) - 1.0)
        low = np.minimum(place.astype(np.int64), len(PRICES) - 2)
        rows, share = np.arange(len(slots)), place - low
        return np.asarray(found[rows, low] * (1.0 - share) + found[rows, low + 1] * share, np.float64)


def _assign(gains: Floats, fixed: Floats) -> Ints:
    """The member of most gain for each request, -1 for none: int64 [S]. gains: float64 [M, S]; fixed: float64 [M], what using one costs.

    A member whose requests do not bring in its fixed cost is left out, the worst of them first, and its requests look again.
    """
    gains = gains.copy()
    while True:
        best = gains.argmax(axis=0)
        of_best = gains.max(axis=0)
        best[of_best <= 0.0] = -1
        surplus = np.array([of_best[best == index].sum() - cost for index, cost in enumerate(fixed.tolist())])
        used = np.array([(best == index).any() for index in range(len(fixed))])
        losing = np.flatnonzero(used & (surplus <= 0.0))
        if not len(losing):
            return np.asarray(best, np.int64)
        gains[losing[surplus[losing].argmin()]] = -np.inf
