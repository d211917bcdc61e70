"""Costs and usage in the shapes of OpenAI's organization endpoints."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

import orjson
from pydantic import BaseModel, Field

from service.billing.price_book import exact_dollars
from service.domain.money import Meter
from service.ports import ChargeRow
from service.usecases.usage_pages import UsageBucket, UsagePage

_ITEM_NAMES = {Meter.INPUT: "input", Meter.CACHED_INPUT: "cached input", Meter.OUTPUT: "output"}


class AmountObject(BaseModel):
    """`value` is written with all its decimal digits; what reads it as a float rounds it."""

    value: float
    currency: Literal["usd"]


class CostsResult(BaseModel):
    """A sum of charges. Fields that are not grouped by are null."""

    object: Literal["organization.costs.result"]
    amount: AmountObject
    line_item: str | None
    project_id: str | None
    api_key_id: str | None
    organization_id: str | None


class CostsBucket(BaseModel):
    object: Literal["bucket"]
    start_time: int
    end_time: int
    results: list[CostsResult]


class CostsPage(BaseModel):
    object: Literal["page"]
    data: list[CostsBucket]
    has_more: bool
    next_page: str | None


class CompletionsResult(BaseModel):
    """Tokens and lines. Fields that are not grouped by are null."""

    object: Literal["organization.usage.completions.result"]
    input_tokens: int = Field(description="Includes the cached ones.")
    input_cached_tokens: int
    output_tokens: int
    input_audio_tokens: Literal[0]
    output_audio_tokens: Literal[0]
    num_model_requests: int = Field(description="Delivered lines, less those whose charge was taken back.")
    project_id: str | None
    user_id: None
    api_key_id: str | None
    model: str | None
    batch: bool | None


class CompletionsBucket(BaseModel):
    object: Literal["bucket"]
    start_time: int
    end_time: int
    results: list[CompletionsResult]


class CompletionsPage(BaseModel):
    object: Literal["page"]
    data: list[CompletionsBucket]
    has_more: bool
    next_page: str | None


def costs_page(page: UsagePage, by: Sequence[str], groups: Collection[str], line_items: Collection[str] | None) -> dict[str, Any]:
    """The answer of `GET /v1/organization/costs`. `by` names the parts of the rows' keys, `groups` what the caller grouped by."""
    return _page(page, lambda bucket: list(_cost_results(bucket, by, groups, line_items)))


def completions_page(page: UsagePage, by: Sequence[str], groups: Collection[str]) -> dict[str, Any]:
    """The answer of `GET /v1/organization/usage/completions`."""
    return _page(page, lambda bucket: [_completions_result(row, dict(zip(by, row.key, strict=True)), groups) for row in bucket.rows])


def _page(page: UsagePage, results: Any) -> dict[str, Any]:
    return {
        "object": "page",
        "data": [{"object": "bucket", "start_time": b.start, "end_time": b.end, "results": results(b)} for b in page.buckets],
        "has_more": page.next_page is not None,
        "next_page": page.next_page,
    }


def _cost_results(
    bucket: UsageBucket, by: Sequence[str], groups: Collection[str], line_items: Collection[str] | None
) -> Iterator[dict[str, Any]]:
    """Meters are line items of their own where they are grouped by, and summed up where they are not."""
    sums: dict[tuple[str | None, ...], int] = {}
    for row in bucket.rows:
        key = dict(zip(by, row.key, strict=True))
        for meter, amount in row.amounts.items():
            item = f"{key['model']}, {_ITEM_NAMES[Meter(meter)]}" if "model" in key else None
            if line_items is not None and item not in line_items:
                continue
            group = (item if "line_item" in groups else None, key.get("project"), key.get("api_key") or None)
            sums[group] = sums.get(group, 0) + amount
    for (item, project, api_key), amount in sums.items():
        yield {
            "object": "organization.costs.result",
            "amount": {"value": orjson.Fragment(exact_dollars(amount).encode()), "currency": "usd"},
            "line_item": item,
            "project_id": project,
            "api_key_id": api_key,
            "organization_id": None,
        }


def _completions_result(row: ChargeRow, key: dict[str, str], groups: Collection[str]) -> dict[str, Any]:
    tokens = {meter: row.quantities.get(meter.value, 0) for meter in Meter}
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": tokens[Meter.INPUT] + tokens[Meter.CACHED_INPUT],
        "input_cached_tokens": tokens[Meter.CACHED_INPUT],
        "output_tokens": tokens[Meter.OUTPUT],
        "input_audio_tokens": 0,
        "output_audio_tokens": 0,
        "num_model_requests": row.lines,
        "project_id": key.get("project"),
        "user_id": None,
        "api_key_id": key.get("api_key") or None,
        "model": key.get("model"),
        "batch": True if "batch" in groups else None,
    }
