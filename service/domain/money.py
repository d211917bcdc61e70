"""Money as exact integers, and the shapes of the ledger.

The ledger's unit is the femto-dollar (1e-15): a rate is nano-dollars per million tokens, so tokens x rate is a whole number of
femto-dollars and nothing is ever rounded before a report prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum

FEMTO_PER_NANO = 10**6
FEMTO_PER_DOLLAR = 10**15


class Meter(StrEnum):
    """What is counted and priced."""

    INPUT = "input"
    CACHED_INPUT = "cached_input"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Rates:
    """Nano-dollars per million tokens, discount already taken off."""

    input: int
    cached_input: int
    output: int

    def of(self, meter: Meter) -> int:
        return int(getattr(self, meter.value))


@dataclass(frozen=True, slots=True)
class PriceBook:
    """One immutable version of all prices. `default` prices a model that has no entry of its own."""

    version: int
    created_at: datetime
    models: Mapping[str, Rates]
    default: Rates

    def rates(self, model: str) -> Rates:
        return self.models.get(model, self.default)


class LedgerKind(StrEnum):
    """With the line, the key that makes a transaction unique."""

    CHARGE = "charge"
    REVERSAL = "reversal"


@dataclass(frozen=True, slots=True)
class Leg:
    """One side of a transaction: positive debits `account`, negative credits it. `quantity` tokens at `rate` where it is metered."""

    account: str
    amount: int
    meter: Meter | None = None
    quantity: int = 0
    rate: int = 0


@dataclass(frozen=True, slots=True)
class LedgerTransaction:
    """Legs that sum to zero, posted together or not at all; UNIQUE (batch_id, line_no, kind)."""

    project_id: str
    batch_id: str
    line_no: int
    kind: LedgerKind
    model: str
    price_version: int
    legs: tuple[Leg, ...]


@dataclass(frozen=True, slots=True)
class ChargeDetail:
    """Charges or reversals of one day, batch, model, meter and price. `amount`: femto-dollars, `rate`: nano-dollars per million tokens.

    A reversal has a negative amount and quantity, and `charged_on`, the day of the charge that it takes back.
    """

    day: date
    project_id: str
    project_name: str
    batch_id: str
    model: str
    price_version: int
    kind: LedgerKind
    charged_on: date
    meter: Meter
    rate: int
    quantity: int
    amount: int
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Reservation:
    """The worst case of one line, held for the lease (`group_id`, `token`) under which it is to run."""

    line_no: int
    group_id: int
    token: int
    amount: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """Line numbers that may run, that have to wait for others to settle below their worst case, and that can not fit any more."""

    granted: frozenset[int]
    waiting: frozenset[int]
    refused: frozenset[int]
