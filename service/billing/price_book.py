"""Rates and amounts between people and the ledger: exact on the way in, rounded once and half-even on the way out."""

from __future__ import annotations

import re

from service.domain.money import FEMTO_PER_DOLLAR, FEMTO_PER_NANO, Rates
from service.errors import InvalidRequest

NANO_PER_DOLLAR = 10**9
RATE_PLACES = 9
MAX_DOLLARS = 10**6
"""Dollars per million tokens: far above any price, and a million lines of it still fit the ledger's columns."""

_AMOUNT = re.compile(r"([0-9]{1,12})(?:\.([0-9]+))?")
_RATE = re.compile(r"([0-9]{1,9})(?:\.([0-9]+))?")


def parse_rate(text: str) -> int:
    """Dollars per million tokens, as a decimal string, in nano-dollars per million tokens.

    Raises:
        InvalidRequest: not a plain decimal number, negative, beyond `MAX_DOLLARS`, or finer than a nano-dollar (nothing is rounded).
    """
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise InvalidRequest(f"A price is a decimal number of dollars per million tokens, such as 0.15; got {text[:64]!r}.", param="price")
    whole, fraction = int(match[1]), (match[2] or "").rstrip("0")
    if len(fraction) > RATE_PLACES:
        raise InvalidRequest(f"A price has at most {RATE_PLACES} decimal places (nano-dollars); got {text[:64]!r}.", param="price")
    if whole > MAX_DOLLARS:
        raise InvalidRequest(f"A price is at most {MAX_DOLLARS:,} dollars per million tokens; got {text[:64]!r}.", param="price")
    return whole * NANO_PER_DOLLAR + int(fraction.ljust(RATE_PLACES, "0"))


def parse_rates(input: str, cached_input: str, output: str) -> Rates:
    """The three rates of a model. Raises InvalidRequest as `parse_rate` does."""
    return Rates(parse_rate(input), parse_rate(cached_input), parse_rate(output))


def parse_amount(text: str) -> int:
    """Dollars, as a decimal string, in femto-dollars.

    Raises:
        InvalidRequest: not a plain decimal number, negative, or with more than 15 decimal places.
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match is None or len((match[2] or "").rstrip("0")) > 15:
        raise InvalidRequest(f"An amount is a decimal number of dollars with at most 15 decimal places, such as 2.50; got {text[:64]!r}.")
    return int(match[1]) * FEMTO_PER_DOLLAR + int((match[2] or "").rstrip("0").ljust(15, "0"))


def format_rate(nano_dollars: int) -> str:
    """A rate as `parse_rate` reads it: 20_000_000 -> '0.02'."""
    return exact_dollars(nano_dollars * FEMTO_PER_NANO)


def exact_dollars(femto: int) -> str:
    """An amount with all its digits: 1_500_000_000_000_000 -> '1.5'."""
    sign = "-" if femto < 0 else ""
    whole, part = divmod(abs(femto), FEMTO_PER_DOLLAR)
    digits = f"{part:015d}".rstrip("0")
    return f"{sign}{whole}.{digits}" if digits else f"{sign}{whole}"


def rounded_dollars(femto: int, places: int = 2) -> str:
    """An amount rounded half-even to `places` decimals (0 to 15), trailing zeros kept: what an invoice prints."""
    if not 0 <= places <= 15:
        raise ValueError(f"places must be 0 to 15, got {places}")
    unit = 10 ** (15 - places)
    units, rest = divmod(abs(femto), unit)
    if 2 * rest > unit or (2 * rest == unit and units % 2 == 1):
        units += 1
    sign = "-" if femto < 0 and units else ""
    whole, part = divmod(units, 10**places)
    return f"{sign}{whole}.{part:0{places}d}" if places else f"{sign}{whole}"
