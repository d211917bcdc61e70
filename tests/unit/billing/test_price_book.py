"""Prices in and out: exact, or refused; rounded once, half to even."""

from decimal import ROUND_HALF_EVEN, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.billing.price_book import exact_dollars, format_rate, parse_rate, rounded_dollars
from service.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "nano"),
    [("0.02", 20_000_000), ("15", 15 * 10**9), ("0", 0), ("0.000000001", 1), ("1.500", 1_500_000_000), (" 2.5 ", 25 * 10**8)],
)
def test_a_rate_is_read_exactly(text, nano):
    assert parse_rate(text) == nano


@pytest.mark.parametrize("text", ["", "-1", "1e-3", "0.0000000001", "1,5", ".5", "1.", "nan", "1000001", "0x1", "٣"])
def test_a_rate_that_is_not_exact_is_refused(text):
    with pytest.raises(InvalidRequest):
        parse_rate(text)


@given(st.integers(0, 10**15))
def test_a_rate_survives_the_way_out_and_back(nano):
    assert parse_rate(format_rate(nano)) == nano


@given(st.integers(-(10**24), 10**24))
def test_exact_dollars_are_the_decimal_value(femto):
    assert Decimal(exact_dollars(femto)) == Decimal(femto).scaleb(-15)


@given(st.integers(-(10**20), 10**20), st.integers(0, 15))
def test_rounding_is_half_even(femto, places):
    expected = Decimal(femto).scaleb(-15).quantize(Decimal(1).scaleb(-places), ROUND_HALF_EVEN)
    assert Decimal(rounded_dollars(femto, places)) == expected


def test_a_rounded_nothing_has_no_sign():
    assert rounded_dollars(-1, 2) == "0.00"
