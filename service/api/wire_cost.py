"""Cost reports and estimates on the wire."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from service.api.wire import InputErrorObject, InputErrors
from service.billing.price_book import exact_dollars
from service.usecases.estimate import DryRun


class CostLines(BaseModel):
    """Lines of the batch; `billed` are the delivered ones, less those whose charge was taken back."""

    total: int
    billed: int
    completed: int
    failed: int


class MeterObject(BaseModel):
    """Tokens of one kind and model at one rate. Dollars are exact decimal strings."""

    model: str
    meter: Literal["input", "cached_input", "output"]
    quantity: int
    dollars_per_million: str
    amount: str


class SpeculationObject(BaseModel):
    """Tokens: drafted = pruned + verified, verified = accepted + rejected."""

    drafted: int
    verified: int
    accepted: int
    rejected: int
    pruned: int
    acceptance_length: float | None = Field(description="Tokens per target forward pass; 1 is plain decoding.")
    acceptance_rate: float | None
    saved_seconds_estimate: float | None = Field(
        description="Device seconds: plain decoding by the engine's cost model, less what was measured; negative: a loss."
    )
    estimate_error: float | None = Field(description="The cost model's error on the steps that were measured: 0.05 is 5% too high.")


class TokensObject(BaseModel):
    """Tokens as the machine worked through them."""

    prompt: int
    cached: int
    prefilled: int
    generated: int
    wasted: int = Field(description="Drafts thrown away, positions computed again, tokens behind a stop: billed to no one.")


class DeviceSeconds(BaseModel):
    """Device time of the delivered lines."""

    prefill: float
    draft: float
    decode: float
    total: float


class BatchCostObject(BaseModel):
    """What a batch is charged, and the work behind it."""

    object: Literal["batch.cost"]
    batch_id: str
    status: str
    model: str | None
    currency: Literal["usd"]
    amount: str = Field(description="Dollars, exact, as a decimal string.")
    final: bool
    price_version: int
    lines: CostLines
    meters: list[MeterObject]
    tokens: TokensObject
    speculation: SpeculationObject
    device_seconds: DeviceSeconds


class RangeObject(BaseModel):
    """Dollars as exact decimal strings, or tokens."""

    min: str | int
    expected: str | int
    max: str | int


class EstimateLine(BaseModel):
    """The lines of one model."""

    model: str
    lines: int
    prompt_tokens: int
    output_tokens: RangeObject
    amount: RangeObject
    assumptions: str


class EstimateObject(BaseModel):
    """What a batch would cost. `errors`: what it would be failed for; empty means that it would run."""

    object: Literal["batch.estimate"] = "batch.estimate"
    currency: Literal["usd"] = "usd"
    price_version: int
    lines: int
    invalid_lines: int = Field(description="Lines that would not run, or that the endpoint would refuse; never billed.")
    amount: RangeObject
    models: list[EstimateLine]
    errors: InputErrors


def estimate_object(run: DryRun) -> EstimateObject:
    estimate = run.estimate
    return EstimateObject(
        price_version=run.price_version,
        lines=run.total,
        invalid_lines=run.invalid,
        amount=_dollars((estimate.total(0), estimate.total(1), estimate.total(2))),
        models=[
            EstimateLine(
                model=price.model,
                lines=price.lines,
                prompt_tokens=price.prompt_tokens,
                output_tokens=RangeObject(min=price.answer_tokens[0], expected=price.answer_tokens[1], max=price.answer_tokens[2]),
                amount=_dollars(price.amounts),
                assumptions=estimate.assumptions[price.model],
            )
            for price in estimate.prices
        ],
        errors=InputErrors(data=[InputErrorObject(code=e.code, message=e.message, param=e.param, line=e.line) for e in run.errors]),
    )


def _dollars(amounts: tuple[int, int, int]) -> RangeObject:
    least, expected, most = map(exact_dollars, amounts)
    return RangeObject(min=least, expected=expected, max=most)
