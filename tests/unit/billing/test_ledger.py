"""Charges balance, bill each token once, and can be taken back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.billing.ledger import REVENUE, amount, charge, receivable, reversal
from service.domain.line import LineOutcome, Outcome
from service.domain.money import LedgerKind, Meter, Rates
from service.domain.usage import Usage

RATES = Rates(input=20_000_000, cached_input=10_000_000, output=60_000_000)
usages = st.builds(lambda fresh, cached, output: Usage(fresh + cached, cached, output), *[st.integers(0, 10**7) for _ in range(3)])


def outcome(usage=None, kind=Outcome.SUCCEEDED):
    return LineOutcome("batch_1", 7, 1, "c7", kind, 200, {}, usage=usage or Usage(100, 30, 5))


def post(usage=None):
    return charge(outcome(usage), project_id="proj_1", model="m", rates=RATES, price_version=3)


@given(usages)
def test_the_legs_sum_to_zero_and_the_debit_is_the_price(usage):
    legs = post(usage).legs
    assert sum(leg.amount for leg in legs) == 0
    assert sum(leg.amount for leg in legs if leg.account == receivable("proj_1")) == amount(usage, RATES)
    assert all(leg.amount == leg.quantity * leg.rate for leg in legs if leg.meter)


def test_cached_input_is_billed_as_cached_and_not_again_as_input():
    by_meter = {leg.meter: leg.quantity for leg in post().legs if leg.meter}
    assert by_meter == {Meter.INPUT: 70, Meter.CACHED_INPUT: 30, Meter.OUTPUT: 5}
    assert amount(Usage(100, 30, 5), RATES) == 70 * 20_000_000 + 30 * 10_000_000 + 5 * 60_000_000


def test_a_free_line_has_a_transaction_too():
    free = charge(outcome(Usage()), project_id="p", model="m", rates=Rates(0, 0, 0), price_version=1)
    assert [leg.amount for leg in free.legs] == [0, 0]
    assert free.legs[-1].account == REVENUE


@pytest.mark.parametrize("kind", [Outcome.REJECTED, Outcome.FAILED])
def test_what_did_not_succeed_is_never_billed(kind):
    with pytest.raises(ValueError, match="only delivered answers"):
        charge(outcome(kind=kind), project_id="p", model="m", rates=RATES, price_version=1)


def test_more_cached_than_input_is_impossible():
    with pytest.raises(ValueError, match="impossible usage"):
        post(Usage(input_tokens=1, cached_tokens=2))


def test_a_reversal_is_the_opposite_and_cannot_be_reversed():
    taken_back = reversal(post())
    assert taken_back.kind is LedgerKind.REVERSAL
    assert [leg.amount for leg in taken_back.legs] == [-leg.amount for leg in post().legs]
    with pytest.raises(ValueError, match="only a charge"):
        reversal(taken_back)
