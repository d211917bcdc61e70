"""Staying under a cap: what a line can cost at worst, and who may still run. Pure, in femto-dollars."""

from __future__ import annotations

from collections.abc import Sequence

from service.domain.money import Rates, Reservation, Reserved
from service.domain.request_body import GenerationRequest

CAP_REACHED = "max_cost_reached"
"""Error code of lines that were left out so that the batch stays under its cap."""

_TEMPLATE_TOKENS, _TURN_TOKENS = 64, 8
"""A default system prompt and the marks around a turn, in the chat templates of current models."""


def prompt_bound(request: GenerationRequest) -> int:
    """At least as many tokens as the prompt has: one a byte, which is the worst that tokenizers with a byte fallback do.

    The chat template's own words are allowed for in passing; a template that adds more is caught when the line is delivered.
    """
    tokens = sum(len(prompt) for prompt in request.prompts if not isinstance(prompt, str))
    texts = request.prompt_texts
    return tokens + (_TEMPLATE_TOKENS if texts else 0) + sum(_TURN_TOKENS + len(text.encode()) for text in texts)


def worst_case(prompt_tokens: int, answer_tokens: int, rates: Rates) -> int:
    """The most a line can be charged: no prompt token found in the cache (or the dearer of the two rates), the whole answer used."""
    return prompt_tokens * max(rates.input, rates.cached_input) + answer_tokens * rates.output


def reserve(wanted: Sequence[Reservation], *, cap: int, charged: int, held: int) -> Reserved:
    """Grants in the given order as long as the sum of charges and reservations cannot pass `cap`.

    A line that would fit if every other reservation came to nothing waits; one that would not even then is refused for good, since
    charges only grow.
    """
    granted: set[int] = set()
    waiting: set[int] = set()
    refused: set[int] = set()
    room = cap - charged
    for reservation in wanted:
        if reservation.amount > room:
            refused.add(reservation.line_no)
        elif held + reservation.amount > room:
            waiting.add(reservation.line_no)
        else:
            granted.add(reservation.line_no)
            held += reservation.amount
    return Reserved(frozenset(granted), frozenset(waiting), frozenset(refused))
