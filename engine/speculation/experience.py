"""What is known of a drafter: what its drafts bring, what its time costs, and at which loads that paid. No torch, no clock.

Within a job it is learned step by step. What lasts of it, speeds and rates and nothing of any text, can be kept beside the machine's
profile, so that a job of seconds need not find out again what the job before it knew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

PRICES: Floats = np.linspace(0.0, 1.0, 11)
"""Tokens that the verification of a draft costs, for each of which a worth is kept."""
_LOADS = 24
"""Of up to 1, 2, 4, 8 ... requests together."""
_LASTING = 1.0 - 1.0 / 4096
"""Per step of a request: what lasts is about many jobs."""
_USUAL = 3.0
"""What took this many times what it was expected to says no more than that."""
_TIMES = 0.98
"""Per measurement: times are of the last fifty."""
_RECALLED = 0.5
"""How much measured times of an earlier engine count: the machine may be busier now, or less."""


def load_class(requests: int) -> int:
    """Which load so many requests are: those of up to 1, 2, 4, 8 ... are alike."""
    return min(max(requests - 1, 0).bit_length(), _LOADS - 1)


@dataclass(slots=True)
class Mean:
    """Of what was added, the older the less: a number or an array of them. weight: additions that count."""

    total: Floats
    weight: float = 0.0

    def add(self, value: Floats | float, fade: float) -> None:
        self.fade(fade)
        self.total = np.asarray(self.total + value)
        self.weight += 1.0

    def fade(self, fade: float) -> None:
        self.total = self.total * fade
        self.weight *= fade

    def held(self, prior: Floats, weight: float) -> Floats:
        """The mean, held to `prior` as if that had been added `weight` times."""
        return np.asarray((self.total + weight * prior) / (self.weight + weight))

    def light(self, weight: float) -> Mean:
        """A copy that counts for `weight` additions at most."""
        share = min(weight / self.weight, 1.0) if self.weight else 1.0
        return Mean(self.total * share, self.weight * share)


def no_tokens() -> Mean:
    """Of tokens a step by price: nothing is known yet."""
    return Mean(np.zeros(len(PRICES)))


@dataclass(slots=True)
class Seconds:
    """Least squares of what something takes: `fixed`, and `each` for every one of a count. Until it was measured it is free.

    The first time in an engine does not count: it compiles and allocates.
    """

    normal: Floats = field(default_factory=lambda: np.diag([1e-3, 1e-3]))
    moment: Floats = field(default_factory=lambda: np.zeros(2))
    known: bool = False
    _begun: bool = False
    _solution: tuple[float, float] = (0.0, 0.0)

    @property
    def fixed(self) -> float:
        return self._solution[0]

    @property
    def each(self) -> float:
        return self._solution[1]

    def learn(self, count: int, seconds: float) -> None:
        if not self._begun:
            self._begun = True
            return
        row = np.array([1.0, count])
        if self.known:
            seconds = min(seconds, _USUAL * (self.fixed + self.each * count))
        self.normal = _TIMES * self.normal + np.outer(row, row)
        self.moment = _TIMES * self.moment + row * seconds
        self.known = True
        self._solve()

    def recalled(self) -> Seconds:
        """What an engine starts with that was told this."""
        made = Seconds(_RECALLED * self.normal, _RECALLED * self.moment, self.known)
        made._solve()
        return made

    def _solve(self) -> None:
        fixed, each = np.maximum(np.linalg.solve(self.normal + np.diag([1e-6, 1e-6]), self.moment), 0.0).tolist()
        self._solution = (fixed, each)


@dataclass(slots=True)
class Experience:
    """Of one drafter. brought: tokens a step of a request by price, over many jobs. income: by load, tokens a step of a request that it
    was worth beyond the lookup and its own time, where it was chosen; 0 where it was not. drafting: of a pass, by requests. intake: of
    hidden states, by tokens.
    """

    brought: Mean = field(default_factory=no_tokens)
    income: list[Mean] = field(default_factory=lambda: [Mean(np.zeros(())) for _ in range(_LOADS)])
    drafting: Seconds = field(default_factory=Seconds)
    intake: Seconds = field(default_factory=Seconds)

    def add_brought(self, tokens: Floats, steps: int) -> None:
        """float64 [P]: a request's mean of a step, which counts for so many."""
        self.brought.fade(_LASTING**steps)
        self.brought.total = self.brought.total + steps * tokens
        self.brought.weight += steps

    def add_income(self, requests: int, tokens: float) -> None:
        """Of each of so many requests in a step."""
        self.income[load_class(requests)].add(tokens, _LASTING)

    def to_json(self) -> str:
        """Numbers alone."""
        return json.dumps(
            {
                "brought": _numbers(self.brought),
                "income": [_numbers(mean) for mean in self.income],
                "drafting": [*self.drafting.normal.ravel().tolist(), *self.drafting.moment.tolist()],
                "intake": [*self.intake.normal.ravel().tolist(), *self.intake.moment.tolist()],
            }
        )

    @staticmethod
    def from_json(text: str) -> Experience:
        """What an engine starts with. Raises ValueError for anything that `to_json` does not write."""
        try:
            told = json.loads(text)
            brought, income = _mean(told["brought"], len(PRICES)), [_mean(one, 1) for one in told["income"]]
            drafting, intake = _seconds(told["drafting"]), _seconds(told["intake"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no record of a drafter: {error}") from error
        if len(income) != _LOADS:
            raise ValueError(f"it has {len(income)} loads, not {_LOADS}")
        return Experience(brought, [Mean(mean.total[0], mean.weight) for mean in income], drafting, intake)


class Records(Protocol):
    """Where the experience with drafters outlasts an engine."""

    def recall(self, name: str) -> Experience | None:
        """What is known of a drafter; None where nothing is."""
        ...

    def keep(self, name: str, experience: Experience) -> None:
        """A failure costs no more than what would have been known."""
        ...


def _numbers(mean: Mean) -> list[float]:
    return [*np.atleast_1d(mean.total).tolist(), mean.weight]


def _array(values: Any, size: int) -> Floats:
    found = np.array(values, np.float64)
    if found.shape != (size,) or not np.isfinite(found).all():
        raise ValueError(f"{size} finite numbers were expected, not {values!r:.100}")
    return found


def _mean(values: Any, size: int) -> Mean:
    *total, weight = _array(values, size + 1).tolist()
    if weight < 0.0:
        raise ValueError(f"nothing was added {weight} times")
    return Mean(np.array(total), weight)


def _seconds(values: Any) -> Seconds:
    found = _array(values, 6)
    normal, moment = found[:4].reshape(2, 2), found[4:]
    if (np.linalg.eigvalsh(normal) < -1e-9 * np.trace(normal)).any():
        raise ValueError("its measurements of time do not go together")
    return Seconds(normal, moment, known=bool(moment.any())).recalled()
