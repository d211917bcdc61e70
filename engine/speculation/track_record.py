"""What steps teach: how likely drafts stand, how deep to draft, what each drafter earned, how fast a request goes. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.speculation.calibration import Calibration, Discount
from engine.speculation.forced import FORCED, PRIOR
from engine.speculation.portfolio import earned

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from engine.drafters.base import Drafts
    from engine.sequence import Sequence
    from engine.speculation.choices import Choices
    from engine.speculation.proposal import Proposal

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

_MEMORY = 0.8
"""How much of a drafter's depth, and of the chance that its blocks stand, is what it was the step before."""
_PACE = 0.9
"""How much of a request's pace (tokens a step) is what it was the step before."""
_FIRST_DEPTH = 8
"""Draft tokens a request at first; then a little more than what was lately verified."""


class TrackRecord:
    """Of drafters by name, forced drafts among them, and of the requests in `slots` slots."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._calibrations: dict[str, Calibration] = {}
        self._discounts: dict[str, Discount] = {}
        self._depths: dict[str, float] = {}
        self._wholes: dict[str, float] = {}
        self._paces = np.ones(slots)
        self.add(FORCED, PRIOR)

    def add(self, name: str, prior: Floats) -> None:
        """A drafter that nothing is known of. prior: float64 [bins], see `Calibration`."""
        self._calibrations[name] = Calibration(prior, self._slots)
        self._discounts[name] = Discount()

    def remove(self, name: str) -> None:
        """Forgets a drafter."""
        for known in (self._calibrations, self._discounts, self._depths, self._wholes):
            known.pop(name, None)

    def enter(self, slot: int, names: Iterable[str]) -> None:
        """A new request took the slot; drafters `names` may draft for it."""
        for name in (*names, FORCED):
            self._calibrations[name].reset(slot)
        self._paces[slot] = 1.0

    def survival(self, name: str, slots: Ints, bins: Ints) -> Floats:
        """float64 [S, D]: the chance that drafts 0..j of each request all stand, discounted; bins as in `Calibration.survival`."""
        return self._calibrations[name].survival(slots, bins) * self._discounts[name].factor

    def trust(self, name: str, slots: Ints) -> tuple[Floats, Floats]:
        """What drafter `name`'s confidence is worth: log odds by bin, and their shifts in the requests of `slots`; see `Calibration`."""
        return self._calibrations[name].log_odds, self._calibrations[name].shifts(slots)

    def paces(self, slots: Ints) -> Floats:
        """float64 [S]: tokens a step of each request, lately."""
        return np.asarray(self._paces[slots])

    def depth(self, name: str) -> int:
        """How many drafts of a request are worth making."""
        return int(np.ceil(self._depths.get(name, _FIRST_DEPTH)))

    def whole(self, name: str) -> float:
        """How likely a whole block of a drafter is to stand, lately; 0 before there was one."""
        return self._wholes.get(name, 0.0)

    def learn_blocks(self, name: str, block: int, lengths: Ints, survival: Floats) -> None:
        """Drafts were made by a drafter of blocks of `block`: lengths int64 [S], survival float64 [S, D]."""
        if (whole := lengths >= block).any():
            found = float(survival[whole, block - 1].mean())
            self._wholes[name] = _MEMORY * self._wholes.get(name, found) + (1.0 - _MEMORY) * found

    def settle(self, proposal: Proposal, sequences: list[Sequence], accepted: Ints, following: Ints, choices: Choices) -> None:
        """Learns from a verified step; `choices` hear what each drafter's drafts brought.

        accepted: int64 [S]; following: int64 [S], the target's token after the accepted ones.
        """
        slots = np.array([sequence.slot for sequence in sequences], np.int64)
        there = slots >= 0  # the others ended before this step was read
        self._paces[slots[there]] = _PACE * self._paces[slots[there]] + (1.0 - _PACE) * (1.0 + accepted[there])
        if not proposal.groups:
            return
        stood, seen = _decided(proposal, accepted, following)
        for name, members in proposal.groups:
            if name not in self._calibrations:
                continue
            self._calibrations[name].observe(slots[members], proposal.bins[members], stood[members], seen[members])
            self._learn_depth(name, proposal.chosen[members])
            discount = self._discounts[name]
            discount.observe(_promised(proposal, members) / discount.factor, float(accepted[members].sum()))
            templates = [sequences[row].request.template for row in members]
            brought = earned(proposal.survival[members], _stood(proposal, members, accepted))
            choices.learn(name, slots[members], templates, brought)
        for name, members, drafts in proposal.shadows:
            matched, known = _matches(drafts, proposal, members, accepted, following)
            self._calibrations[name].observe(slots[members], drafts.bins, matched, np.minimum(matched + 1, known))

    def _learn_depth(self, name: str, chosen: Ints) -> None:
        """Draft no deeper than what is likely to be verified: one more than the deepest of lately."""
        deepest = float(chosen.max(initial=0)) + 1.0
        before = self._depths.get(name, float(_FIRST_DEPTH))
        self._depths[name] = max(deepest, _MEMORY * before + (1.0 - _MEMORY) * deepest)


def _decided(proposal: Proposal, accepted: Ints, following: Ints) -> tuple[Ints, Ints]:
    """How many leading drafts of each row stood, and how many the step decided: int64 [S] both."""
    stood, seen = accepted.copy(), np.minimum(accepted + 1, proposal.chosen)
    # A certain draft that was not verified can still be held against the token that came in its place.
    certain = np.ones(len(accepted), bool)
    for members, _ in proposal.probabilities:
        certain[members] = False
    beyond = certain & (accepted == proposal.chosen) & (proposal.drafted > accepted)
    at = np.minimum(accepted, proposal.token_ids.shape[1] - 1)
    stood[beyond] += proposal.token_ids[np.arange(len(accepted)), at][beyond] == following[beyond]
    seen[beyond] += 1
    return stood, seen


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
