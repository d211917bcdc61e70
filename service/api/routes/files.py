"""Files: upload, list, retrieve, download, delete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Annotated, Any, BinaryIO, Literal
from urllib.parse import quote

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response, StreamingResponse

from service.api.auth import Reader, Writer
from service.api.context import Ctx
from service.api.ranges import parse_range
from service.api.uploads import receive_upload
from service.api.wire import ErrorObject, FileDeleted, FileList, FileObject, file_list, file_object
from service.domain.account import File, FilePurpose
from service.usecases import files

router = APIRouter(prefix="/v1/files", tags=["Files"])

READ_SIZE = 1 << 18
_UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "JSON lines, one request each."},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                }
            }
        },
    }
}


@router.post("", summary="Upload a file", openapi_extra=_UPLOAD_BODY, responses={413: {"model": ErrorObject}, 415: {"model": ErrorObject}})
async def upload_file(request: Request, caller: Writer, ctx: Ctx) -> FileObject:
    """Takes the input of a batch. The body is streamed into the object store; parts may come in any order."""
    limit = ctx.settings.limits.max_file_bytes
    intake = files.FileIntake(ctx.blobs, caller.project_id, max_bytes=limit)
    return file_object(await receive_upload(request, intake, ctx.database, max_bytes=limit))


@router.get("", summary="List files")
def list_files(
    caller: Reader,
    ctx: Ctx,
    after: Annotated[str | None, Query(max_length=100, pattern="^[A-Za-z0-9_-]*$")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: FilePurpose | None = None,
) -> FileList:
    """The project's files, newest first."""
    page = files.list_files(ctx.database, caller.project_id, after=after or None, limit=limit, ascending=order == "asc", purpose=purpose)
    return file_list(page.items, page.has_more)


@router.get("/{file_id}", summary="Retrieve a file", responses={404: {"model": ErrorObject}})
def retrieve_file(file_id: str, caller: Reader, ctx: Ctx) -> FileObject:
    """What is known about a file."""
    return file_object(files.get_file(ctx.database, caller.project_id, file_id))


@router.delete("/{file_id}", summary="Delete a file", responses={404: {"model": ErrorObject}, 409: {"model": ErrorObject}})
def delete_file(file_id: str, caller: Writer, ctx: Ctx) -> FileDeleted:
    """Refused with 409 while a batch that has not ended reads the file."""
    files.delete_file(ctx.database, caller.project_id, file_id)
    return FileDeleted(id=file_id)


@router.get(
    "/{file_id}/content",
    summary="Download a file",
    response_class=Response,
    responses={206: {"description": "The range asked for."}, 404: {"model": ErrorObject}, 416: {"model": ErrorObject}},
)
def download_file(
    file_id: str,
    caller: Reader,
    ctx: Ctx,
    byte_range: Annotated[str | None, Header(alias="range")] = None,
    if_range: Annotated[str | None, Header()] = None,
) -> Response:
    """The bytes, or one range of them (`Range: bytes=...`, `If-Range` with the ETag)."""
    file = files.get_file(ctx.database, caller.project_id, file_id)
    etag = f'"{file.sha256}"'
    asked = parse_range(byte_range, file.bytes) if if_range in (None, etag) else None
    part = asked or files.Slice(0, file.bytes)
    headers = _content_headers(file, etag, part)
    if asked is not None:
        headers["content-range"] = f"bytes {part.start}-{part.stop - 1}/{file.bytes}"
    stream = files.open_content(ctx.blobs, file, part)
    return StreamingResponse(_chunks(stream), status_code=206 if asked else 200, headers=headers, media_type="application/octet-stream")


def _content_headers(file: File, etag: str, part: files.Slice) -> dict[str, str]:
    return {
        "content-length": str(part.length),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "accept-ranges": "bytes",
        "etag": etag,
    }


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    with closing(stream):
        while chunk := stream.read(READ_SIZE):
            yield chunk
