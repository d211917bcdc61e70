"""The objects on the wire: OpenAI's shapes, field by field, and Longdraft's own additions to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

import orjson
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from service.billing.price_book import exact_dollars
from service.domain.account import File
from service.domain.ids import copied_input_id
from service.domain.job import Batch
from service.domain.usage import Usage
from service.usecases.status import BatchView


class Json(JSONResponse):
    """JSON by orjson."""

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class FileObject(BaseModel):
    """A file. Its bytes are at `/v1/files/{id}/content`."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"
    expires_at: int | None
    status_details: str | None = None


class FileDeleted(BaseModel):
    """What a deletion answers."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileList(BaseModel):
    """One page of files. Ask for the next one with `after=<last_id>`."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class RequestCounts(BaseModel):
    """Lines of the input. `failed` are those that are in the error file."""

    total: int
    completed: int
    failed: int


class InputDetails(BaseModel):
    """`cached_tokens` were not computed again: another line had the same prefix."""

    cached_tokens: int


class OutputDetails(BaseModel):
    """Part of `output_tokens`."""

    reasoning_tokens: int


class UsageObject(BaseModel):
    """Tokens of the delivered lines."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class InputErrorObject(BaseModel):
    """Why the input file was refused. `line` counts from 1."""

    code: str
    message: str
    param: str | None
    line: int | None


class InputErrors(BaseModel):
    """OpenAI's list object around the errors."""

    object: Literal["list"] = "list"
    data: list[InputErrorObject]


class ProgressObject(BaseModel):
    """How a batch is getting on (Longdraft's own)."""

    lines_done: int
    tokens_per_second: float | None = Field(description="Of the live workers on this batch's model, while it runs.")
    eta_seconds: int | None = Field(description="At the pace since it started; null until a line is done, and once it ended.")
    acceptance_length: float | None = Field(description="Tokens per target forward pass over the delivered lines: 1 is plain decoding.")


class CostObject(BaseModel):
    """What the delivered lines are charged (Longdraft's own)."""

    amount: str = Field(description="Dollars, exact, as a decimal string.")
    currency: Literal["usd"] = "usd"
    final: bool


class BatchObject(BaseModel):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: InputErrors | None
    input_file_id: str | None
    completion_window: str
    status: Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: UsageObject
    metadata: dict[str, str] | None
    priority: int
    drafter: str
    on_invalid_line: Literal["fail", "skip"]
    parent_batch_id: str | None
    input_uri: str | None = Field(description="The object that was read; `input_file_id` is the service's copy of it.")
    input_etag: str | None = Field(description="The version of it that was read.")
    input_changed: bool | None = Field(description="Whether there was another version of it when the batch ended; null: not known.")
    output_uri: str | None = Field(description="The folder that gets the results, besides the output and error file.")
    max_cost: str | None = Field(description="Dollars that the batch may cost at most, as a decimal string.")
    progress: ProgressObject
    cost: CostObject


class BatchList(BaseModel):
    """One page of batches, newest first. Ask for the next one with `after=<last_id>`."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ModelObject(BaseModel):
    """A name that a line's `model` may have. An alias is listed like a model; `root` is what answers."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["longdraft"] = "longdraft"
    root: str
    aliases: list[str]


class ModelList(BaseModel):
    """All models and aliases."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


def file_object(file: File) -> FileObject:
    """A file as OpenAI shows it; ours are complete when they become visible, hence always `processed`."""
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=_seconds(file.created_at),
        filename=file.filename,
        purpose=file.purpose.value,
        expires_at=_seconds_or_none(file.expires_at),
    )


def file_list(files: Sequence[File], has_more: bool) -> FileList:
    """A page of files."""
    first, last = (files[0].id, files[-1].id) if files else (None, None)
    return FileList(data=[file_object(file) for file in files], first_id=first, last_id=last, has_more=has_more)


def batch_object(view: BatchView) -> BatchObject:
    """A batch as OpenAI shows it, with progress and cost. Times are whole Unix seconds."""
    batch, progress = view.batch, view.progress
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        model=batch.model,
        errors=_errors(batch),
        input_file_id=batch.input_file_id or copied_input_id(batch.id),
        completion_window=batch.completion_window,
        status=batch.status.value,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=_seconds(batch.created_at),
        in_progress_at=_seconds_or_none(batch.in_progress_at),
        expires_at=_seconds(batch.expires_at),
        finalizing_at=_seconds_or_none(batch.finalizing_at),
        completed_at=_seconds_or_none(batch.completed_at),
        failed_at=_seconds_or_none(batch.failed_at),
        expired_at=_seconds_or_none(batch.expired_at),
        cancelling_at=_seconds_or_none(batch.cancelling_at),
        cancelled_at=_seconds_or_none(batch.cancelled_at),
        request_counts=RequestCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
        usage=_usage(batch.usage),
        metadata=dict(batch.metadata) or None,
        priority=batch.priority,
        drafter=batch.drafter,
        on_invalid_line=batch.on_invalid_line.value,
        parent_batch_id=batch.parent_batch_id,
        input_uri=batch.input_uri,
        input_etag=batch.input_etag,
        input_changed=batch.input_changed,
        output_uri=batch.output_uri,
        max_cost=None if batch.max_cost is None else exact_dollars(batch.max_cost),
        progress=ProgressObject(
            lines_done=progress.lines_done,
            tokens_per_second=progress.tokens_per_second,
            eta_seconds=progress.eta_seconds,
            acceptance_length=progress.acceptance_length,
        ),
        cost=CostObject(amount=view.amount, final=batch.status.terminal),
    )


def batch_list(views: Sequence[BatchView], has_more: bool) -> BatchList:
    """A page of batches."""
    first, last = (views[0].batch.id, views[-1].batch.id) if views else (None, None)
    return BatchList(data=[batch_object(view) for view in views], first_id=first, last_id=last, has_more=has_more)


def _usage(usage: Usage) -> UsageObject:
    return UsageObject(
        input_tokens=usage.input_tokens,
        input_tokens_details=InputDetails(cached_tokens=usage.cached_tokens),
        output_tokens=usage.output_tokens,
        output_tokens_details=OutputDetails(reasoning_tokens=usage.reasoning_tokens),
        total_tokens=usage.total_tokens,
    )


def _errors(batch: Batch) -> InputErrors | None:
    if not batch.errors:
        return None
    return InputErrors(data=[InputErrorObject(code=e.code, message=e.message, param=e.param, line=e.line) for e in batch.errors])


def _seconds(at: datetime) -> int:
    return int(at.timestamp())


def _seconds_or_none(at: datetime | None) -> int | None:
    return None if at is None else _seconds(at)
