"""Files by presigned URL: clients put and get the bytes at the object store itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from service.api.auth import Reader, Writer
from service.api.body import read_json
from service.api.context import Ctx
from service.api.errors import invalid_fields
from service.api.wire import ErrorObject, FileObject, file_object
from service.usecases import presigned
from service.usecases.files import EXPIRY_SECONDS, check_expiry, check_purpose

router = APIRouter(prefix="/v1/files", tags=["Files"])


class ExpiresAfter(BaseModel):
    """When the file expires."""

    model_config = ConfigDict(extra="forbid", strict=True)
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=EXPIRY_SECONDS[0], le=EXPIRY_SECONDS[-1])]


class UploadUrlBody(BaseModel):
    """What is going to be put."""

    model_config = ConfigDict(extra="forbid", strict=True)
    filename: str
    purpose: str = Field(description="'batch'.")
    bytes: Annotated[int, Field(gt=0, description="Exactly so many will be put: the URL is good for no other size.")]
    sha256: str | None = Field(None, description="Of the bytes, in hexadecimal: compared when the upload is registered.")
    expires_after: ExpiresAfter | None = None


class SignedUrl(BaseModel):
    """A request to send to the object store, `headers` as they are, until `expires_at`."""

    object: Literal["file.url"] = "file.url"
    file_id: str
    method: Literal["PUT", "GET"]
    url: str
    headers: dict[str, str]
    expires_at: int


_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/UploadUrlBody"}}}}
}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorObject}}


@router.post("/upload_url", summary="Get a URL to put a file", openapi_extra=_BODY, responses={413: {"model": ErrorObject}})
async def upload_url(request: Request, caller: Writer, ctx: Ctx) -> SignedUrl:
    """For large inputs: the bytes go straight to the object store. Then `POST /v1/files/{file_id}/register`.

    400 with the code `presigned_urls_unavailable` where this server keeps its objects in a folder.
    """
    body = _parsed(await read_json(request, ctx.settings.limits))
    check_purpose(body.purpose)
    expires = check_expiry(body.expires_after.anchor, str(body.expires_after.seconds)) if body.expires_after else None
    signed = await run_in_threadpool(
        presigned.start_upload,
        ctx.database,
        ctx.blobs,
        caller.project_id,
        filename=body.filename,
        size=body.bytes,
        sha256=body.sha256,
        expires_after=expires,
        max_bytes=ctx.settings.limits.max_file_bytes,
    )
    return _signed_url(signed)


@router.post("/{file_id}/register", summary="Register what was put", responses=_NOT_FOUND | {409: {"model": ErrorObject}})
def register_upload(file_id: str, caller: Writer, ctx: Ctx) -> FileObject:
    """Reads the bytes once, verifies size and hash, and makes them a file. 409 where they are missing or others than announced."""
    return file_object(presigned.register_upload(ctx.database, ctx.blobs, caller.project_id, file_id))


@router.get("/{file_id}/download_url", summary="Get a URL to download a file", responses=_NOT_FOUND)
def download_url(file_id: str, caller: Reader, ctx: Ctx) -> SignedUrl:
    """The same bytes as `/content`, from the object store itself. 400 with `presigned_urls_unavailable` as for `upload_url`."""
    return _signed_url(presigned.download_url(ctx.database, ctx.blobs, caller.project_id, file_id))


def _parsed(body: dict[str, Any]) -> UploadUrlBody:
    try:
        return UploadUrlBody.model_validate(body)
    except ValidationError as error:
        raise invalid_fields(error.errors(include_url=False)) from None


def _signed_url(signed: presigned.SignedFile) -> SignedUrl:
    request = signed.request
    return SignedUrl(
        file_id=signed.file_id,
        method="PUT" if request.method == "PUT" else "GET",
        url=request.url,
        headers=dict(request.headers),
        expires_at=int(signed.expires_at.timestamp()),
    )
