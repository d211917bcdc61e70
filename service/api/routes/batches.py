"""Batches: create, list, retrieve, results while running, cancel, retry, cost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from service.api.auth import Reader, Writer
from service.api.body import read_json
from service.api.context import Context, Ctx
from service.api.create_body import parse_create
from service.api.wire import BatchList, BatchObject, ErrorObject, batch_list, batch_object
from service.api.wire_cost import BatchCostObject, EstimateObject, estimate_object
from service.billing.reports import cost_json
from service.usecases import results, submit
from service.usecases.cancel import cancel_batch
from service.usecases.estimate import estimate_batch
from service.usecases.report import batch_cost
from service.usecases.retry_failed import retry_failed

router = APIRouter(prefix="/v1/batches", tags=["Batches"])

JSON_LINES = ("application/jsonl", "application/x-ndjson")
_CREATE_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/CreateBatchBody"}}}}
}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorObject}}
_REFUSED = _NOT_FOUND | {409: {"model": ErrorObject}}
RetryCount = Annotated[str | None, Header(alias="x-stainless-retry-count", include_in_schema=False)]


@router.post("", summary="Create a batch", openapi_extra=_CREATE_BODY, responses=_REFUSED)
async def create_batch(
    request: Request,
    caller: Writer,
    ctx: Ctx,
    idempotency_key: Annotated[str | None, Header(description="The same key with the same body gives the same batch.")] = None,
    retry_count: RetryCount = None,
) -> BatchObject | EstimateObject:
    """Starts a batch on an uploaded file. What is wrong in the file itself shows later, in the batch's `errors`.

    With `dry_run: true` nothing is created, and the answer is an estimate of the price.
    """
    body = await read_json(request, ctx.settings.limits)
    repeat = submit.Repeatability(
        digest=hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).digest(),
        idempotency_key=idempotency_key,
        retry=_is_repeat(retry_count),
    )
    if body.get("dry_run") is True:
        return await run_in_threadpool(_estimate, body, caller, ctx)
    return await run_in_threadpool(_create, body, repeat, caller, ctx)


@router.post("/estimate", summary="Estimate the price of a batch", openapi_extra=_CREATE_BODY, responses=_NOT_FOUND)
async def estimate(request: Request, caller: Writer, ctx: Ctx) -> EstimateObject:
    """Takes the body of a create, checks the input and counts its tokens. Creates nothing."""
    return await run_in_threadpool(_estimate, await read_json(request, ctx.settings.limits), caller, ctx)


@router.get("", summary="List batches")
def list_batches(
    caller: Reader,
    ctx: Ctx,
    after: Annotated[str | None, Query(max_length=100, pattern="^[A-Za-z0-9_-]*$")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> BatchList:
    """The project's batches, newest first."""
    page = ctx.views.page(ctx.database, caller.project_id, after=after or None, limit=limit)
    return batch_list(page.items, page.has_more)


@router.get("/{batch_id}", summary="Retrieve a batch", responses=_NOT_FOUND)
def retrieve_batch(batch_id: str, caller: Reader, ctx: Ctx) -> BatchObject:
    """Status, counts, usage, progress and cost so far."""
    return batch_object(ctx.views.get(ctx.database, caller.project_id, batch_id))


@router.post("/{batch_id}/cancel", summary="Cancel a batch", responses=_REFUSED)
def cancel(batch_id: str, caller: Writer, ctx: Ctx) -> BatchObject:
    """Stops it. Lines that are done keep their answers (and their price); the others go to the error file as `batch_cancelled`."""
    return batch_object(ctx.views.of(ctx.database, cancel_batch(ctx.database, caller.project_id, batch_id)))


@router.post("/{batch_id}/retry", summary="Retry the failed lines", responses=_REFUSED)
def retry_batch(batch_id: str, caller: Writer, ctx: Ctx, retry_count: RetryCount = None) -> BatchObject:
    """A new batch, linked to this one, with the lines that are not in its output file."""
    batch = retry_failed(batch_id, caller=caller, database=ctx.database, blobs=ctx.blobs, blind_repeat=_is_repeat(retry_count))
    return batch_object(ctx.views.of(ctx.database, batch))


@router.get("/{batch_id}/results", summary="Results while running", response_class=Response, responses=_NOT_FOUND)
def batch_results(
    batch_id: str,
    caller: Reader,
    ctx: Ctx,
    after: Annotated[int, Query(ge=0, le=2**62, description="The `cursor` of the page before.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="About how many lines; a commit is never torn apart.")] = 100,
    accept: Annotated[str, Header()] = "application/json",
) -> Response:
    """Delivered lines in commit order, good and failed ones, as they will stand in the output and error files.

    A JSON list with `cursor` and `has_more`, or bare lines for `Accept: application/jsonl`, with both in the headers
    `x-next-cursor` and `x-has-more`. `has_more` looks at what is committed now: while the batch runs, ask again later.
    """
    page = results.results_after(ctx.database, caller.project_id, batch_id, cursor=after, limit=limit)
    lines = results.read_lines(ctx.blobs, page.results)
    first = next(lines, None)  # what cannot be read at all is still an error answer, not a broken body
    read = chain([first] if first is not None else [], lines)
    if accept.split(";")[0].strip().lower() in JSON_LINES:
        headers = {"x-next-cursor": str(page.cursor), "x-has-more": str(page.has_more).lower()}
        return StreamingResponse(read, media_type=JSON_LINES[0], headers=headers)
    return StreamingResponse(_as_list(read, page), media_type="application/json")


@router.get("/{batch_id}/cost", summary="The bill of a batch", responses=_NOT_FOUND)
def cost(batch_id: str, caller: Reader, ctx: Ctx) -> BatchCostObject:
    """Charges by model and meter, and what speculation did. Only delivered lines are charged; final once the batch has ended."""
    return BatchCostObject.model_validate(cost_json(batch_cost(ctx.database, caller.project_id, batch_id)))


def _create(body: dict[str, Any], repeat: submit.Repeatability, caller: Writer, ctx: Context) -> BatchObject:
    batch = submit.create_batch(parse_create(body), repeat=repeat, caller=caller, database=ctx.database)
    return batch_object(ctx.views.of(ctx.database, batch))


def _estimate(body: dict[str, Any], caller: Writer, ctx: Context) -> EstimateObject:
    run = estimate_batch(
        parse_create(body),
        caller=caller,
        database=ctx.database,
        blobs=ctx.blobs,
        buckets=ctx.buckets,
        limits=ctx.settings.limits,
        resolve_model=ctx.settings.resolve_model,
        tokenizers=ctx.tokenizers,
    )
    return estimate_object(run)


def _as_list(lines: Iterator[bytes], page: results.ResultPage) -> Iterator[bytes]:
    yield b'{"object":"list","data":['
    for number, line in enumerate(lines):
        yield (b"," if number else b"") + line.rstrip(b"\n")
    tail: Sequence[Any] = (str(page.cursor), page.has_more)
    yield b'],"cursor":%b,"has_more":%b}' % tuple(orjson.dumps(value) for value in tail)


def _is_repeat(retry_count: str | None) -> bool:
    return retry_count is not None and retry_count.isdecimal() and int(retry_count[:9]) > 0
