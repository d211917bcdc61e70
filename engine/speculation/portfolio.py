"""Which of several drafters drafts for a request in a step: decided before anything is drawn, by what each earned. No torch, no clock.

A drafter's worth for a request is the number of its drafts that stand per step, less what verifying them costs, learned on verified
trajectories: of the request, of its template, of all, each lending to the former while that is young. What verification costs (the price
of a draft, in tokens that its time would have brought otherwise) changes with the batch, so the worth is kept for a range of prices. The
text lookup costs nothing and is always asked, and its worth is what its matches promise right now: those depend on confirmed text alone.
A neural drafter must be worth more than the lookup by at least the tokens that its own time would have brought otherwise. So no choice
ever reads a token that is not yet admitted; picking the drafter whose *realised* drafts look best would bias the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

_FADE = 0.9
"""Per step of a request: its record is about its last ten steps."""
_LEND = 2.0
"""Steps that a template's record counts for in a request's, and the overall record in a template's."""
_OPTIMISM = 0.75
"""Chance that a draft stands if those before it do, before the drafter was ever tried; one trial corrects it."""
_FIRST_PROBE = 32
"""Steps without use after which a drafter is tried for one request; tried in vain, after twice as many, and so on."""
_TRIALS = 4
"""Drafts of a new drafter that are for one request at a time: until then both its worth and its time are guesses, the first ones' luck is
no verdict."""
_PATIENCE = 512
"""Steps without a single paying use after which a drafter is let go. Steps so full that hardly any draft could pay do not count."""
FULL = 0.5
"""The price of a draft in such steps."""
_AHEAD = 24
"""Steps before a trial in which a drafter must attend to the texts, to have something to draft from."""
_USUAL = 3.0
"""A pass that took this many times what it was expected to says no more than that."""
_MAX_TEMPLATES = 4096
_KEPT = 0.25
"""Of a drafter's record when its weights are exchanged."""


PRICES: Floats = np.linspace(0.0, 1.0, 11)
"""Tokens that the verification of a draft costs, for each of which a worth is kept."""


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
class _Record:
    """What drafts brought by price, and steps, fading."""

    brought: Floats = field(default_factory=lambda: np.zeros(len(PRICES)))
    steps: float = 0.0

    def add(self, brought: Floats, fade: float) -> None:
        self.fade(fade)
        self.brought = self.brought + brought
        self.steps += 1.0

    def fade(self, fade: float) -> None:
        self.brought = self.brought * fade
        self.steps *= fade

    def mean(self, prior: Floats) -> Floats:
        return np.asarray((self.brought + _LEND * prior) / (self.steps + _LEND))


@dataclass(slots=True)
class _Member:
    """overall: over all requests. templates: by name. slots: by the request's slot. seconds: [fixed, per request] of a draft pass, of which
    the first does not count: it compiles and allocates. tags: the templates it was made for; none: for all. idle: steps since it paid.
    unwanted: steps since it would have been chosen, had it known the texts.
    """

    slots: list[_Record]
    tags: tuple[str, ...] = ()
    overall: _Record = field(default_factory=_Record)
    templates: dict[str | None, _Record] = field(default_factory=dict)
    seconds: Floats = field(default_factory=lambda: np.zeros(2))
    normal: Floats = field(default_factory=lambda: np.diag([1e-3, 1e-3]))
    moment: Floats = field(default_factory=lambda: np.zeros(2))
    passes: int = 0
    idle: int = 0
    unwanted: int = 0
    next_probe: int = _FIRST_PROBE

    def suits(self, template: str | None) -> bool:
        return not self.tags or template in self.tags


class Portfolio:
    """`neural`: the drafters that compete with the lookup, and the templates each is made for. One entry a slot for each of `slots`
    running requests.

    A drafter is tried first where its tags name the request's template, or where it has none; elsewhere it has to prove itself in probes.
    """

    def __init__(self, neural: Mapping[str, tuple[str, ...]], slots: int) -> None:
        self._slots = slots
        self._members: dict[str, _Member] = {}
        for name, tags in neural.items():
            self.add(name, tags)

    @property
    def neural(self) -> tuple[str, ...]:
        return tuple(self._members)

    def add(self, name: str, tags: tuple[str, ...]) -> None:
        """`name` takes part from now on, for requests that run already as well; what a drafter of that name earned before is forgotten."""
        self._members[name] = _Member([_Record() for _ in range(self._slots)], tags)

    def remove(self, name: str) -> None:
        self._members.pop(name, None)

    def enter(self, slot: int) -> None:
        """A new request took the slot."""
        for member in self._members.values():
            member.slots[slot] = _Record()

    def attends(self, name: str) -> bool:
        """Whether `name` should follow the texts: it would have been chosen lately, or is to be tried soon."""
        member = self._members.get(name)
        return member is not None and (member.unwanted < _FIRST_PROBE or member.idle >= member.next_probe - _AHEAD)

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
        fixed = np.array([self._members[name].seconds[0] for name in names]) * tokens_per_second
        everyone = np.ones(len(slots), bool)
        able = np.stack([(follows or {}).get(name, everyone) for name in names])
        wanted = _assign(gains, fixed)
        best = wanted if able.all() else _assign(np.where(able, gains, -np.inf), fixed)
        for index, name in enumerate(names):
            rows = np.flatnonzero(best == index)
            member = self._members[name]
            member.unwanted = 0 if (wanted == index).any() else member.unwanted + 1
            if member.overall.steps < _TRIALS and len(rows) > 1:
                rows = rows[gains[index, rows].argmax()][None]
            for row in rows:
                chosen[row] = name
            for slot in np.delete(slots, rows).tolist():
                member.slots[slot].fade(_FADE)  # what a request held against it is forgotten, or it could never be corrected
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
        for slot, template, tokens in zip(slots.tolist(), templates, brought, strict=True):
            member.slots[slot].add(tokens, _FADE)
            member.overall.add(tokens, 1.0 - (1.0 - _FADE) / 16)
            if template not in member.templates and len(member.templates) >= _MAX_TEMPLATES:
                del member.templates[next(iter(member.templates))]
            member.templates.setdefault(template, _Record()).add(tokens, 1.0 - (1.0 - _FADE) / 4)

    def learn_seconds(self, name: str, requests: int, seconds: float) -> None:
        """How long a draft pass of `name` took for so many requests."""
        member = self._members.get(name)
        if member is None:
            return
        member.passes += 1
        if member.passes == 1:
            return
        row = np.array([1.0, requests])
        if member.passes > 2:
            seconds = min(seconds, _USUAL * float(row @ member.seconds))
        member.normal = 0.98 * member.normal + np.outer(row, row)
        member.moment = 0.98 * member.moment + row * seconds
        member.seconds = np.maximum(np.linalg.solve(member.normal + np.diag([1e-6, 1e-6]), member.moment), 0.0)

    def let_go(self) -> list[str]:
        """Takes out the drafters that have not paid for long; returns their names."""
        gone = [name for name, member in self._members.items() if member.idle >= _PATIENCE]
        for name in gone:
            del self._members[name]
        return gone

    def forget(self, name: str) -> None:
        """`name` drafts in another way from now on: what it earned before weighs less, so that it is judged anew."""
        if member := self._members.get(name):
            for record in (member.overall, *member.templates.values(), *member.slots):
                record.fade(_KEPT)
            member.idle, member.unwanted, member.next_probe = 0, 0, _FIRST_PROBE

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
        return np.asarray(brought - lookup - member.seconds[1] * tokens_per_second, np.float64)

    def _worth(self, member: _Member, slots: Ints, templates: list[str | None], prices: Floats) -> Floats:
        """float64 [S]: tokens a step that its drafts bring each request, where a draft's verification costs `prices` [S]."""
        overall = {
            suits: member.overall.mean(_HOPE if suits else np.zeros(len(PRICES))) for suits in {member.suits(name) for name in templates}
        }
        kinds: dict[str | None, Floats] = {}
        for template in set(templates):
            everyone, kind = overall[member.suits(template)], member.templates.get(template)
            kinds[template] = everyone if kind is None else kind.mean(everyone)
        if member.overall.steps < _TRIALS:
            found = np.array([_HOPE if member.suits(name) else 0.0 * _HOPE for name in templates])
        else:
            found = np.array([member.slots[slot].mean(kinds[name]) for slot, name in zip(slots.tolist(), templates, strict=True)])
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
