"""multipart/form-data for uploads: parsed as it arrives, the file's bytes going straight on to the blob store."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import suppress

from anyio import CancelScope, fail_after
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from service.api.body import refuse_compressed
from service.domain.account import File
from service.errors import InvalidRequest, LongdraftError, TooLarge, UnsupportedEncoding
from service.ports import Database
from service.usecases.files import FileIntake, check_expiry, check_purpose

CHUNK = 1 << 18
"""Bytes handed to a thread at once: large enough to make the hop cheap, small enough to be flat in memory."""
OVERHEAD = 1 << 16
"""What part headers and the other fields may weigh on top of the file."""
MAX_FIELD_BYTES = 1024
IDLE_SECONDS = 60.0
"""A client that sends nothing for this long is gone, whatever its connection says."""
FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns about every byte after the last boundary


class UploadStalled(LongdraftError):
    """The body stopped arriving."""

    code, status, type = "request_timeout", 408, "invalid_request_error"


class UploadForm:
    """Feeds the `file` part to a `FileIntake` and keeps the other fields, in whatever order they come."""

    def __init__(self, content_type: str, intake: FileIntake, *, max_bytes: int) -> None:
        """Raises UnsupportedEncoding for another media type, InvalidRequest without a usable boundary."""
        media_type, options = parse_options_header(content_type)
        if media_type != b"multipart/form-data":
            raise UnsupportedEncoding("Send the upload as multipart/form-data with the parts 'file' and 'purpose'.")
        boundary = options.get(b"boundary", b"")
        if not 1 <= len(boundary) <= 70:
            raise InvalidRequest("The Content-Type header has no usable multipart boundary.")
        self._intake = intake
        self._left = max_bytes + OVERHEAD
        self._fields: dict[str, str] = {}
        self._name: str | None = None
        self._value = bytearray()
        self._headers: dict[str, bytes] = {}
        self._header_name, self._header_value = bytearray(), bytearray()
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._headers.clear,
                "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                "on_header_end": self._header_ended,
                "on_headers_finished": self._part_started,
                "on_part_data": self._part_data,
                "on_part_end": self._part_ended,
                "on_end": self._form_ended,
            },
        )

    def feed(self, data: bytes) -> None:
        """The next bytes of the body.

        Raises:
            InvalidRequest: malformed, or a part that does not belong here.
            TooLarge: the file is over its limit, or everything around it is.
        """
        self._left -= len(data)
        if self._left < 0:
            raise TooLarge("The upload is over the size limit.", param="file")
        if self._ended:
            return
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequest(f"The multipart body is malformed: {error}.") from None

    def save(self, database: Database) -> File:
        """Call after the last byte.

        Raises:
            InvalidRequest: the body was cut short, or a field is missing or wrong.
        """
        if not self._ended:
            raise InvalidRequest("The multipart body ends before its closing boundary: the upload was cut short.")
        purpose = check_purpose(self._fields.get("purpose"))
        expires_after = check_expiry(self._fields.get("expires_after[anchor]"), self._fields.get("expires_after[seconds]"))
        return self._intake.save(database, purpose=purpose, expires_after=expires_after)

    def _header_ended(self) -> None:
        self._headers[self._header_name.decode("latin-1").lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _part_started(self) -> None:
        disposition, options = parse_options_header(self._headers.get("content-disposition"))
        name = _text(options.get(b"name", b""))
        if disposition != b"form-data" or not name:
            raise InvalidRequest("Every part needs a Content-Disposition of form-data with a name.")
        if self._headers.get("content-encoding", b"identity").lower() != b"identity":
            raise UnsupportedEncoding("A part is compressed: send it as it is.", param=name)
        if self._headers.get("content-transfer-encoding", b"binary").lower() not in (b"binary", b"7bit", b"8bit"):
            raise UnsupportedEncoding("A part has a Content-Transfer-Encoding: send it as it is.", param=name)
        self._name = name
        if name == "file":
            if b"filename" not in options:
                raise InvalidRequest("The part 'file' needs a filename.", param="file")
            self._intake.open(_text(options[b"filename"]))
        elif name not in FIELDS:
            raise InvalidRequest(f"Unknown parameter: {name[:64]!r}.", param=name[:64], code="unknown_parameter")
        elif name in self._fields:
            raise InvalidRequest(f"The parameter '{name}' was sent twice.", param=name)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._intake.write(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"The parameter '{self._name}' is over {MAX_FIELD_BYTES} bytes.", param=self._name)

    def _part_ended(self) -> None:
        assert self._name is not None
        if self._name != "file":
            self._fields[self._name] = _text(bytes(self._value))
            self._value.clear()
        if self._name == "purpose":
            check_purpose(self._fields["purpose"])  # where it comes first, a wrong one need not wait for the file

    def _form_ended(self) -> None:
        self._ended = True


async def receive_upload(request: Request, intake: FileIntake, database: Database, *, max_bytes: int) -> File:
    """Reads the request's body to its end and saves the file. Whatever goes wrong, nothing of it stays in the blob store.

    Raises:
        LongdraftError: as `UploadForm` says; the rest of the body is then not looked at.
        UploadStalled: nothing came for `IDLE_SECONDS`.
        ClientDisconnect: the client went away.
    """
    try:
        refuse_compressed(request)
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > max_bytes + OVERHEAD:
            raise TooLarge(f"The file is over the limit of {max_bytes:,} bytes.", param="file")
        form = UploadForm(request.headers.get("content-type", ""), intake, max_bytes=max_bytes)
        pending = bytearray()
        async for chunk in _arriving(request):
            pending += chunk
            if len(pending) >= CHUNK:
                await run_in_threadpool(form.feed, bytes(pending))
                pending.clear()
        await run_in_threadpool(form.feed, bytes(pending))
        return await run_in_threadpool(form.save, database)
    finally:
        # Also when the server is stopping and cancels this request: a half-written object must go.
        with CancelScope(shield=True):
            await run_in_threadpool(intake.close)


async def _arriving(request: Request) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        try:
            with fail_after(IDLE_SECONDS):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise UploadStalled(f"The upload stopped: nothing arrived for {IDLE_SECONDS:g} seconds.") from None
        if chunk is None:
            return
        yield chunk


def _text(data: bytes) -> str:
    with suppress(UnicodeDecodeError):
        return data.decode()
    raise InvalidRequest("Part names, filenames and fields must be UTF-8.")
