"""Reservations under a cap: whatever is granted can never pass it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.billing.spending import prompt_bound, reserve, worst_case
from service.domain.money import Rates, Reservation
from service.domain.request_body import CHAT, COMPLETIONS, parse_body

amounts = st.lists(st.integers(0, 100), max_size=12)


@given(amounts, st.integers(1, 300), st.integers(0, 300), st.integers(0, 300))
def test_the_cap_holds_and_everyone_gets_an_answer(amounts: list[int], cap: int, charged: int, held: int) -> None:
    charged = min(charged, cap)
    held = min(held, cap - charged)
    wanted = [Reservation(number, 1, 1, amount) for number, amount in enumerate(amounts)]
    answer = reserve(wanted, cap=cap, charged=charged, held=held)
    granted = sum(amounts[number] for number in answer.granted)
    assert charged + held + granted <= cap
    assert sorted([*answer.granted, *answer.waiting, *answer.refused]) == list(range(len(amounts)))
    assert all(amounts[number] > cap - charged for number in answer.refused)
    assert not answer.waiting or held + granted > 0, "who waits, waits for someone"


def test_the_worst_case_takes_the_dearer_input_rate() -> None:
    assert worst_case(10, 5, Rates(input=2, cached_input=3, output=7)) == 10 * 3 + 5 * 7


def test_no_prompt_has_more_tokens_than_its_bound() -> None:
    chat = parse_body(CHAT, {"model": "m", "messages": [{"role": "user", "content": "ä" * 100}]})
    assert prompt_bound(chat) >= 200 + len("user")
    assert prompt_bound(parse_body(COMPLETIONS, {"model": "m", "prompt": [1, 2, 3]})) == 3
    assert prompt_bound(parse_body(COMPLETIONS, {"model": "m", "prompt": "€"})) >= 3
