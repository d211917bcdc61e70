"""Creating batches: every check that needs no look into the file, and the memory that makes a repeated create harmless."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from service.domain.account import File, FilePurpose
from service.domain.ids import new_batch_id
from service.domain.job import Batch, OnInvalidLine
from service.domain.object_uri import ObjectUri
from service.errors import Conflict, InvalidRequest, NotFound
from service.ports import Database, OutboxKind, UnitOfWork
from service.usecases.files import file_lock, live_file
from service.usecases.keys import Caller

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
WINDOW_BOUNDS = timedelta(minutes=1), timedelta(days=30)
REPEAT_WITHIN = timedelta(minutes=10)
"""An SDK gives up repeating a request long before this."""

_WINDOW = re.compile(r"([0-9]{1,6})([mhd])")
_UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}
_DRAFTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A create as asked for, types already checked."""

    input_file_id: str | None
    endpoint: str
    completion_window: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    output_expires_after: int | None = None
    priority: int = 0
    on_invalid_line: OnInvalidLine = OnInvalidLine.FAIL
    drafter: str = "auto"
    input_uri: str | None = None
    output_uri: str | None = None
    max_cost: int | None = None
    """Femto-dollars that the batch may cost at most."""


@dataclass(frozen=True, slots=True)
class Repeatability:
    """What tells a repeated create from a new one.

    `digest` is the SHA-256 of the canonical body. `retry` says that the client marked the request as its own blind repeat
    (the SDKs send `x-stainless-retry-count`, never an idempotency key).
    """

    digest: bytes
    idempotency_key: str | None = None
    retry: bool = False


def create_batch(request: BatchRequest, *, repeat: Repeatability, caller: Caller, database: Database) -> Batch:
    """Writes the batch and the promise to validate it in one transaction, or finds the batch of an earlier, equal create.

    Raises:
        InvalidRequest: endpoint, window, drafter or the file's purpose.
        NotFound: no such input file in this project.
        Conflict: the idempotency key was used with another body.
    """
    window = parse_window(request.completion_window)
    check_request(request)
    if repeat.idempotency_key is not None and not _IDEMPOTENCY_KEY.fullmatch(repeat.idempotency_key):
        raise InvalidRequest("The Idempotency-Key header must have 1 to 255 printable ASCII characters, without spaces.")
    with database.begin() as uow:
        earlier = _earlier(uow, repeat, caller)
        if earlier is not None:
            return earlier
        if request.input_file_id is not None:
            # The same lock as in delete_file: a batch never starts on a file that is being deleted.
            uow.requests.lock(caller.project_id, file_lock(request.input_file_id))
            input_file(uow, request, caller)
        batch = _new_batch(request, repeat, caller, uow, window)
        if batch.output_uri is not None:
            _claim_output(uow, batch.output_uri)
        uow.batches.add(batch)
        uow.outbox.add(OutboxKind.VALIDATE, batch_id=batch.id)
        if repeat.idempotency_key is not None:
            uow.requests.remember(caller.project_id, repeat.idempotency_key, repeat.digest, batch.id)
    return batch


def parse_window(text: str) -> timedelta:
    """`24h`, `30m`, `7d`. Raises InvalidRequest for another form, or one outside `WINDOW_BOUNDS`."""
    match = _WINDOW.fullmatch(text)
    if match:
        window = int(match[1]) * _UNITS[match[2]]
        if WINDOW_BOUNDS[0] <= window <= WINDOW_BOUNDS[1]:
            return window
    raise InvalidRequest(
        f"'completion_window' must be a number with m, h or d, from 1m to 30d (such as '24h'), got {text[:64]!r}.",
        param="completion_window",
    )


def owned_batch(uow: UnitOfWork, project_id: str, batch_id: str) -> Batch:
    """Raises NotFound for a batch that is unknown or someone else's: the same to the caller."""
    batch = uow.batches.get(project_id, batch_id)
    if batch is None:
        raise NotFound("No such batch.", param="batch_id")
    return batch


def check_request(request: BatchRequest) -> None:
    """What can be told from the request alone. Raises InvalidRequest."""
    parse_window(request.completion_window)
    if request.endpoint not in ENDPOINTS:
        raise InvalidRequest(f"'endpoint' must be one of {', '.join(ENDPOINTS)}; got {request.endpoint[:64]!r}.", param="endpoint")
    if not _DRAFTER.fullmatch(request.drafter):
        raise InvalidRequest(f"'drafter' must be 'auto', 'off' or a drafter's name, got {request.drafter[:64]!r}.", param="drafter")
    if request.input_uri is not None:
        ObjectUri.of_object(request.input_uri, param="input_uri")
    if request.output_uri is not None:
        ObjectUri.of_folder(request.output_uri, param="output_uri")


def _claim_output(uow: UnitOfWork, output_uri: str) -> None:
    """Two batches never write to one folder at the same time. Raises Conflict."""
    uow.requests.lock("", hashlib.sha256(b"output:" + output_uri.encode()).digest())
    if uow.requests.writer_of(output_uri) is not None:
        raise Conflict(f"Another batch is about to write to {output_uri}: use a folder for each batch.", param="output_uri")


def _earlier(uow: UnitOfWork, repeat: Repeatability, caller: Caller) -> Batch | None:
    """The batch that an equal create made. Takes the lock that makes racing equal creates wait for each other."""
    key = repeat.idempotency_key
    if key is None:
        uow.requests.lock(caller.project_id, repeat.digest)
        twin = uow.requests.recent_twin(caller.project_id, caller.key_id, repeat.digest, REPEAT_WITHIN) if repeat.retry else None
        return owned_batch(uow, caller.project_id, twin) if twin else None
    uow.requests.lock(caller.project_id, hashlib.sha256(b"idempotency-key:" + key.encode()).digest())
    remembered = uow.requests.by_key(caller.project_id, key)
    if remembered is None:
        return None
    digest, batch_id = remembered
    if digest != repeat.digest:
        raise Conflict("This Idempotency-Key was used with another request body.", code="idempotency_key_reused")
    return owned_batch(uow, caller.project_id, batch_id)


def input_file(uow: UnitOfWork, request: BatchRequest, caller: Caller) -> File:
    """Raises NotFound, or InvalidRequest where the file has another purpose."""
    assert request.input_file_id is not None
    try:
        file = live_file(uow, caller.project_id, request.input_file_id)
    except NotFound:
        raise NotFound("No such file.", param="input_file_id") from None
    if file.purpose is not FilePurpose.BATCH:
        raise InvalidRequest(
            f"The input file has the purpose '{file.purpose.value}'; upload it with the purpose 'batch'.", param="input_file_id"
        )
    return file


def _new_batch(request: BatchRequest, repeat: Repeatability, caller: Caller, uow: UnitOfWork, window: timedelta) -> Batch:
    return Batch(
        id=new_batch_id(),
        project_id=caller.project_id,
        api_key_id=caller.key_id,
        endpoint=request.endpoint,
        completion_window=request.completion_window,
        input_file_id=request.input_file_id,
        input_uri=request.input_uri,
        output_uri=str(ObjectUri.of_folder(request.output_uri, param="output_uri")) if request.output_uri is not None else None,
        created_at=uow.now,
        expires_at=uow.now + window,
        price_version=uow.ledger.price_book().version,
        metadata=dict(request.metadata),
        output_expires_after=request.output_expires_after,
        priority=request.priority,
        on_invalid_line=request.on_invalid_line,
        drafter=request.drafter,
        max_cost=request.max_cost,
        request_digest=repeat.digest,
    )
