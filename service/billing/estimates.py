"""What a batch will cost, before it runs: a least, an expected and a most price. Pure; exact integers throughout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from service.domain.money import Rates


@dataclass(slots=True)
class ModelSizes:
    """Sums over the lines of one model. `limited_tokens`: what answers with a limit may come to at most."""

    lines: int = 0
    prompt_tokens: int = 0
    answers: int = 0
    limited_answers: int = 0
    limited_tokens: int = 0

    def add(self, prompt_tokens: int, answer_limit: int | None, answers: int = 1) -> None:
        self.lines += 1
        self.prompt_tokens += prompt_tokens
        self.answers += answers
        if answer_limit is not None:
            self.limited_answers += answers
            self.limited_tokens += answer_limit * answers


@dataclass(frozen=True, slots=True)
class AnswerLength:
    """How long answers are expected to be: what earlier lines of the model had on average, if there were any."""

    average: Fraction | None
    longest: int
    """Of an answer without a limit: the context, as far as it is known."""


@dataclass(frozen=True, slots=True)
class Price:
    """Femto-dollars and tokens of one model's lines."""

    model: str
    lines: int
    prompt_tokens: int
    answer_tokens: tuple[int, int, int]
    amounts: tuple[int, int, int]
    """(least, expected, most), like `answer_tokens`."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Least: every prompt token cached and one token an answer. Expected: no prompt token cached, answers as long as earlier ones (without
    any: half their limit). Most: no prompt token cached, every answer as long as it may be."""

    prices: tuple[Price, ...]
    assumptions: Mapping[str, str]
    """What the numbers of each model rest on."""

    def total(self, which: int) -> int:
        return sum(price.amounts[which] for price in self.prices)


def price_of(model: str, sizes: ModelSizes, rates: Rates, answers: AnswerLength) -> Price:
    """The three prices of a model's lines."""
    count = sizes.answers
    most = sizes.limited_tokens + (count - sizes.limited_answers) * answers.longest
    average = answers.average if answers.average is not None else Fraction(most, 2 * count) if count else Fraction(0)
    expected = min(max(round(average * count), count), most)
    tokens = min(count, most), expected, most  # prompts that are only scored have answers of no token
    prompts = [
        sizes.prompt_tokens * rate for rate in (min(rates.input, rates.cached_input), rates.input, max(rates.input, rates.cached_input))
    ]
    amounts = tuple(prompt + answer * rates.output for prompt, answer in zip(prompts, tokens, strict=True))
    return Price(model, sizes.lines, sizes.prompt_tokens, tokens, (amounts[0], amounts[1], amounts[2]))
