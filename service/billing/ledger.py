"""Charges and their reversals, as balanced ledger transactions. Pure: integers in, integers out."""

from __future__ import annotations

from dataclasses import replace

from service.domain.line import LineOutcome, Outcome
from service.domain.money import LedgerKind, LedgerTransaction, Leg, Meter, Rates
from service.domain.usage import Usage

REVENUE = "revenue"


def receivable(project_id: str) -> str:
    """The account that holds what a project owes."""
    return f"receivable:{project_id}"


def metered(usage: Usage) -> dict[Meter, int]:
    """Billed tokens by meter. Input that was found in the cache is billed as cached input and not as input."""
    return {
        Meter.INPUT: usage.input_tokens - usage.cached_tokens,
        Meter.CACHED_INPUT: usage.cached_tokens,
        Meter.OUTPUT: usage.output_tokens,
    }


def amount(usage: Usage, rates: Rates) -> int:
    """The price of this usage in femto-dollars: the sum over meters of tokens x rate."""
    return sum(quantity * rates.of(meter) for meter, quantity in metered(usage).items())


def charge(outcome: LineOutcome, *, project_id: str, model: str, rates: Rates, price_version: int) -> LedgerTransaction:
    """The transaction that bills a delivered line: a debit a meter that counted something, one credit for their sum.

    A line that costs nothing is charged too, so that "one charge a delivered line" has no exception.

    Raises:
        ValueError: the line did not succeed (it is never billed), or its usage is impossible.
    """
    if outcome.outcome is not Outcome.SUCCEEDED:
        raise ValueError(f"line {outcome.line_no} of {outcome.batch_id} is {outcome.outcome.value}: only delivered answers are billed")
    quantities = metered(outcome.usage)
    if min(quantities.values()) < 0:
        raise ValueError(f"line {outcome.line_no} of {outcome.batch_id} has an impossible usage: {outcome.usage}")
    account = receivable(project_id)
    legs = [
        Leg(account, quantity * rates.of(meter), meter, quantity, rates.of(meter))
        for meter, quantity in quantities.items()
        if quantity or meter is Meter.INPUT
    ]
    legs.append(Leg(REVENUE, -sum(leg.amount for leg in legs)))
    return LedgerTransaction(project_id, outcome.batch_id, outcome.line_no, LedgerKind.CHARGE, model, price_version, tuple(legs))


def debited(transaction: LedgerTransaction) -> int:
    """What a charge adds to the bill, femto-dollars."""
    return sum(leg.amount for leg in transaction.legs if leg.meter is not None)


def reversal(transaction: LedgerTransaction) -> LedgerTransaction:
    """Takes a charge back: the same legs with opposite signs. Raises ValueError for anything but a charge."""
    if transaction.kind is not LedgerKind.CHARGE:
        raise ValueError(f"only a charge can be reversed, not a {transaction.kind.value}")
    legs = tuple(replace(leg, amount=-leg.amount, quantity=-leg.quantity) for leg in transaction.legs)
    return replace(transaction, kind=LedgerKind.REVERSAL, legs=legs)
