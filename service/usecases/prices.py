"""Prices of the operator: new versions of the price book, and how they came about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from service.billing.price_book import parse_rate
from service.domain.money import PriceBook, Rates
from service.errors import InvalidRequest
from service.ports import Database

ANY_MODEL = "*"
"""The name that prices every model without an entry of its own."""

_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)\s*%?")


@dataclass(frozen=True, slots=True)
class PriceChange:
    """What to charge for a model: decimal strings, dollars per million tokens; what is None stays as it was."""

    model: str
    input: str | None = None
    cached_input: str | None = None
    output: str | None = None
    discount: str | None = None
    """Taken off all three rates before they are stored, in percent."""


def set_prices(change: PriceChange, *, database: Database, known_models: Sequence[str]) -> PriceBook:
    """Adds a version of the price book. Batches that exist keep the version they were created under.

    Raises:
        InvalidRequest: nothing to change, an unknown model, or a rate that is no whole number of nano-dollars (after the discount).
    """
    if change.model != ANY_MODEL and change.model not in known_models:
        raise InvalidRequest(
            f"No model is registered as {change.model[:64]!r}; known: {', '.join(known_models)}, or {ANY_MODEL} for all others.",
            param="model",
        )
    if change.input is change.cached_input is change.output is change.discount is None:
        raise InvalidRequest("Nothing to change: name --input, --cached, --output or --discount.", param="price")
    discount = parse_discount(change.discount) if change.discount is not None else Fraction(0)
    with database.begin() as uow:
        newest = uow.ledger.price_book()
        old = newest.default if change.model == ANY_MODEL else newest.rates(change.model)
        rates = Rates(
            input=_rate(change.input, old.input, discount),
            cached_input=_rate(change.cached_input, old.cached_input, discount),
            output=_rate(change.output, old.output, discount),
        )
        if change.model == ANY_MODEL:
            return uow.ledger.set_prices({}, default=rates)
        return uow.ledger.set_prices({change.model: rates})


def parse_discount(text: str) -> Fraction:
    """`50%` or `12.5` as a share of one. Raises InvalidRequest outside 0 to 100."""
    match = _PERCENT.fullmatch(text.strip())
    share = Fraction(match[1]) / 100 if match else Fraction(-1)
    if not 0 <= share <= 1:
        raise InvalidRequest(f"A discount is a percentage from 0% to 100%, such as 50%; got {text[:64]!r}.", param="discount")
    return share


def discounted(rate: int, discount: Fraction) -> int:
    """The rate with the discount taken off. Raises InvalidRequest where that is not a whole number of nano-dollars."""
    left = rate * (1 - discount)
    if left.denominator != 1:
        raise InvalidRequest(
            f"A discount of {float(discount):.9%} on {rate} nano-dollars per million tokens is not a whole number of nano-dollars: "
            "choose a rate or a discount that comes out even.",
            param="discount",
        )
    return left.numerator


def _rate(text: str | None, old: int, discount: Fraction) -> int:
    return discounted(parse_rate(text) if text is not None else old, discount)
