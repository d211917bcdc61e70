"""Costs and usage by time bucket, in OpenAI's shapes. A key sees its own project."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from service.api.auth import Reader
from service.api.context import Ctx
from service.api.wire import Json
from service.api.wire_usage import CompletionsPage, CostsPage, completions_page, costs_page
from service.errors import InvalidRequest
from service.usecases.usage_pages import UsageQuery, usage_page

router = APIRouter(prefix="/v1/organization", tags=["Organization"])

DAY = timedelta(days=1)
WIDTHS = {"1m": timedelta(minutes=1), "1h": timedelta(hours=1), "1d": DAY}
PAGE_SIZES = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}
"""Buckets of a page: by default, and at most."""
MAX_NAMES = 100

COST_GROUPS = {"project_id": "project", "api_key_id": "api_key", "line_item": "model"}
USAGE_GROUPS = {"project_id": "project", "api_key_id": "api_key", "model": "model", "batch": None}
"""What `group_by` may name, and what the ledger is grouped by for it (all usage is a batch's)."""

Start = Annotated[int, Query(description="Unix seconds; the first bucket is the one that holds it.")]
End = Annotated[int | None, Query(description="Unix seconds, not included; default: now.")]
Page = Annotated[str | None, Query(max_length=64, description="`next_page` of the answer before.")]
Strings = Annotated[list[str] | None, Query(description="Repeatable; also in the SDKs' form with [] behind the name.")]


@router.get("/costs", summary="Costs by day", response_model=CostsPage)
def costs(
    request: Request,
    caller: Reader,
    ctx: Ctx,
    start_time: Start,
    end_time: End = None,
    bucket_width: Literal["1d"] = "1d",
    limit: Annotated[int, Query(ge=1, le=180, description="Days a page.")] = 7,
    page: Page = None,
    group_by: Strings = None,
    project_ids: Strings = None,
    api_key_ids: Strings = None,
    line_items: Strings = None,
) -> Response:
    """What the project was charged, net of reversals, day by day (UTC). Amounts are exact decimal digits.

    A line item is a model and a meter: `smollm2-135m, output`.
    """
    arrays = _arrays(request, {"group_by": group_by, "project_ids": project_ids, "api_key_ids": api_key_ids, "line_items": line_items})
    groups = _groups(arrays["group_by"], COST_GROUPS)
    query = UsageQuery(
        start=start_time,
        end=end_time,
        width=WIDTHS[bucket_width],
        limit=limit,
        # Line items are told apart below; a filter on them needs the model, too.
        by=_keys(groups if arrays["line_items"] is None else [*groups, "line_item"], COST_GROUPS),
        page=page,
        project_ids=arrays["project_ids"],
        api_key_ids=arrays["api_key_ids"],
    )
    return Json(costs_page(usage_page(ctx.database, caller.project_id, query), query.by, groups, arrays["line_items"]))


@router.get("/usage/completions", summary="Token usage by time", response_model=CompletionsPage)
def completions(
    request: Request,
    caller: Reader,
    ctx: Ctx,
    start_time: Start,
    end_time: End = None,
    bucket_width: Literal["1m", "1h", "1d"] = "1d",
    limit: Annotated[int | None, Query(ge=1, le=1440, description="Buckets a page: 7 days (31), 24 hours (168) or 60 minutes.")] = None,
    page: Page = None,
    group_by: Strings = None,
    project_ids: Strings = None,
    api_key_ids: Strings = None,
    models: Strings = None,
    batch: Annotated[bool | None, Query(description="All usage here is a batch's: false finds nothing.")] = None,
) -> Response:
    """Tokens of the delivered lines, as they were billed. `input_tokens` includes the cached ones."""
    arrays = _arrays(request, {"group_by": group_by, "project_ids": project_ids, "api_key_ids": api_key_ids, "models": models})
    default, most = PAGE_SIZES[bucket_width]
    if limit is not None and limit > most:
        raise InvalidRequest(f"'limit' is at most {most} for buckets of {bucket_width}, got {limit}.", param="limit")
    groups = _groups(arrays["group_by"], USAGE_GROUPS)
    query = UsageQuery(
        start=start_time,
        end=end_time,
        width=WIDTHS[bucket_width],
        limit=limit or default,
        by=_keys(groups, USAGE_GROUPS),
        page=page,
        project_ids=[] if batch is False else arrays["project_ids"],
        api_key_ids=arrays["api_key_ids"],
        models=arrays["models"],
    )
    return Json(completions_page(usage_page(ctx.database, caller.project_id, query), query.by, groups))


def _arrays(request: Request, plain: Mapping[str, list[str] | None]) -> dict[str, list[str] | None]:
    """Array parameters under their name or, as the SDKs send them, under `name[]`. Raises InvalidRequest for more than `MAX_NAMES`."""
    found: dict[str, list[str] | None] = {}
    for name, values in plain.items():
        both = [*(values or ()), *request.query_params.getlist(f"{name}[]")]
        if len(both) > MAX_NAMES or any("\0" in value for value in both):
            raise InvalidRequest(f"'{name}' takes at most {MAX_NAMES} names, without NUL characters.", param=name)
        found[name] = both or None
    if "user_ids" in request.query_params or "user_ids[]" in request.query_params:
        raise InvalidRequest("'user_ids' is not available: keys belong to projects, not to users.", param="user_ids")
    return found


def _groups(asked: list[str] | None, known: Collection[str]) -> list[str]:
    for name in asked or ():
        if name not in known:
            raise InvalidRequest(f"'group_by' takes {', '.join(known)}; got {name[:64]!r}.", param="group_by")
    return list(dict.fromkeys(asked or ()))


def _keys(groups: Collection[str], known: Mapping[str, str | None]) -> list[str]:
    return list(dict.fromkeys(key for group in groups if (key := known[group]) is not None))
