"""The operator's side of the bill: what the machines' time cost, beside what was charged for it. Pure; exact until it is printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from service.billing.price_book import parse_amount
from service.domain.usage import Work
from service.errors import ConfigError, InvalidRequest

NS_PER_HOUR = 3_600 * 10**9
MILLION = 10**6


@dataclass(frozen=True, slots=True)
class HourlyRates:
    """Femto-dollars an hour by device class, lower case. A class is a device's name (`nvidia h200`) or its kind (`cpu`, `cuda`)."""

    classes: Mapping[str, int]

    @classmethod
    def parse(cls, rates: Mapping[str, str]) -> HourlyRates:
        """From settings: device class -> dollars an hour. Raises ConfigError with the class and the value."""
        parsed = {}
        for name, text in rates.items():
            try:
                parsed[name.lower()] = parse_amount(str(text))
            except InvalidRequest as error:
                raise ConfigError(f"[rates] {name}: {error.message}", param="rates") from None
        return cls(parsed)

    def of(self, device: str) -> int | None:
        """The rate of a device such as `cuda (NVIDIA H200)`: by its whole text, its name, or its kind; None where none is set."""
        whole = device.lower()
        kind, _, name = whole.partition(" (")
        return next((self.classes[key] for key in (whole, name.rstrip(")"), kind) if key and key in self.classes), None)

    def cost(self, device: str, nanoseconds: int) -> Fraction | None:
        """Femto-dollars, exact."""
        rate = self.of(device)
        return None if rate is None else Fraction(rate * nanoseconds, NS_PER_HOUR)


@dataclass(frozen=True, slots=True)
class CostLine:
    """One group of a report. `price`: femto-dollars charged, net of reversals. `cost`: femto-dollars of attributed device time, None where
    a device has no rate. Tokens as billed; `work` as measured."""

    key: tuple[str, ...]
    lines: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    price: int
    cost: Fraction | None
    work: Work

    @property
    def margin(self) -> Fraction | None:
        return None if self.cost is None else self.price - self.cost

    @property
    def tokens(self) -> int:
        """Billed tokens of both kinds."""
        return self.input_tokens + self.output_tokens

    def per_million(self, amount: Fraction | int | None) -> Fraction | None:
        """Femto-dollars per million billed tokens."""
        return Fraction(amount) * MILLION / self.tokens if amount is not None and self.tokens else None


def total(lines: Sequence[CostLine]) -> CostLine:
    """The sum of all groups; its cost is known if all of theirs are."""
    costs = [line.cost for line in lines]
    return CostLine(
        ("total",),
        sum(line.lines for line in lines),
        sum(line.input_tokens for line in lines),
        sum(line.cached_tokens for line in lines),
        sum(line.output_tokens for line in lines),
        sum(line.price for line in lines),
        _sum(costs),
        sum((line.work for line in lines), Work()),
    )


def _sum(costs: Iterable[Fraction | None]) -> Fraction | None:
    known = Fraction(0)
    for cost in costs:
        if cost is None:
            return None
        known += cost
    return known


@dataclass(frozen=True, slots=True)
class WorkerLine:
    """Where a worker's wall time went, nanoseconds: busy = attributed to delivered lines + lost (crashes, refused or repeated work)."""

    id: str
    device: str
    wall_ns: int
    busy_ns: int
    attributed_ns: int
    load_ns: int
    profile_ns: int
    idle_ns: int
    cost: Fraction | None
    """Femto-dollars of the whole wall time."""

    @property
    def lost_ns(self) -> int:
        """Computed, and delivered to no one: never billed to a customer."""
        return self.busy_ns - self.attributed_ns

    @property
    def unaccounted(self) -> float:
        """Share of the wall time that no meter knows of; the meters and the database's clock are two, so it is rarely 0."""
        known = self.busy_ns + self.load_ns + self.profile_ns + self.idle_ns
        return (self.wall_ns - known) / self.wall_ns if self.wall_ns else 0.0
