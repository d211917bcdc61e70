"""The multipart form of an upload, fed in pieces of any size."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.uploads import OVERHEAD, UploadForm
from service.domain.account import FilePurpose
from service.errors import InvalidRequest, LongdraftError, TooLarge, UnsupportedEncoding

TYPE = "multipart/form-data; boundary=frontier"
CONTENT = b'{"custom_id": "1"}\r\n--frontie\r\n-\n--frontier comes after CR LF only\n' * 3


class Recorder:
    """Stands where a FileIntake does and keeps what it is given."""

    def __init__(self) -> None:
        self.filenames: list[str] = []
        self.content = b""
        self.saved: dict[str, Any] = {}

    def open(self, filename: str) -> None:
        if self.filenames:
            raise InvalidRequest("second file")
        self.filenames.append(filename)

    def write(self, data: bytes) -> None:
        self.content += data

    def save(self, _database: object, **options: Any) -> str:
        self.saved = options
        return "saved"


def part(name: str, content: bytes, *, filename: str | None = None, headers: Sequence[str] = ()) -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"' + (f'; filename="{filename}"' if filename is not None else "")
    return "\r\n".join(["--frontier", disposition, *headers, "", ""]).encode() + content + b"\r\n"


FILE = part("file", CONTENT, filename="in.jsonl", headers=["Content-Type: application/jsonl"])
PURPOSE = part("purpose", b"batch")
END = b"--frontier--\r\n"


def feed(body: bytes, *, step: int = 1 << 20, max_bytes: int = 10_000, content_type: str = TYPE) -> Recorder:
    recorder = Recorder()
    form = UploadForm(content_type, recorder, max_bytes=max_bytes)  # type: ignore[arg-type]
    for start in range(0, len(body), step):
        form.feed(body[start : start + step])
    assert form.save(None) == "saved"  # type: ignore[arg-type, comparison-overlap]
    return recorder


@given(step=st.integers(1, 200), purpose_first=st.booleans())
def test_the_file_arrives_unchanged_however_the_body_is_cut(step: int, purpose_first: bool) -> None:
    parts = [PURPOSE, FILE] if purpose_first else [FILE, PURPOSE]
    recorder = feed(b"".join(parts) + END, step=step)
    assert recorder.content == CONTENT
    assert recorder.filenames == ["in.jsonl"]
    assert recorder.saved == {"purpose": FilePurpose.BATCH, "expires_after": None}


def test_expiry_is_passed_on() -> None:
    expiry = part("expires_after[anchor]", b"created_at") + part("expires_after[seconds]", b"7200")
    assert feed(FILE + expiry + PURPOSE + END).saved["expires_after"] == timedelta(hours=2)


def test_bytes_after_the_end_are_dropped() -> None:
    assert feed(FILE + PURPOSE + END + b"epilogue" * 10).content == CONTENT


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (FILE + END, "'purpose'"),
        (FILE + part("purpose", b"fine-tune") + END, "'batch'"),
        (FILE + PURPOSE, "cut short"),
        (FILE[:-20], "cut short"),
        (b"", "cut short"),
        (b'{"purpose": "batch"}', "malformed"),
        (FILE + FILE + PURPOSE + END, "second file"),
        (FILE + PURPOSE + PURPOSE + END, "twice"),
        (FILE + PURPOSE + part("color", b"red") + END, "Unknown parameter"),
        (part("purpose", b"x" * 2000) + END, "1024"),
        (part("file", CONTENT) + PURPOSE + END, "filename"),
        (part("", b"x") + END, "name"),
        (b"--frontier\r\n\r\nx\r\n" + END, "name"),
        (part("purpose", b"\xff") + END, "UTF-8"),
        (b"--frontier\r\nX: " + b"y" * 10_000, "malformed"),
    ],
)
def test_a_body_that_is_not_an_upload_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        feed(body)


def test_a_wrong_purpose_ahead_of_the_file_is_refused_at_once() -> None:
    form = UploadForm(TYPE, Recorder(), max_bytes=100)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest):
        form.feed(part("purpose", b"vision") + b"--frontier\r\n")


@pytest.mark.parametrize("header", ["Content-Encoding: gzip", "Content-Transfer-Encoding: base64"])
def test_an_encoded_part_is_refused(header: str) -> None:
    with pytest.raises(UnsupportedEncoding):
        feed(part("file", b"x", filename="a", headers=[header]) + PURPOSE + END)


@pytest.mark.parametrize(
    ("content_type", "error"),
    [
        ("", UnsupportedEncoding),
        ("application/json", UnsupportedEncoding),
        ("multipart/form-data", InvalidRequest),
        ("multipart/form-data; boundary=" + "x" * 71, InvalidRequest),
    ],
)
def test_another_content_type_is_refused(content_type: str, error: type[LongdraftError]) -> None:
    with pytest.raises(error):
        feed(FILE + PURPOSE + END, content_type=content_type)


def test_everything_around_the_file_is_bounded() -> None:
    with pytest.raises(TooLarge):
        feed(FILE + PURPOSE + END + b"x" * OVERHEAD, max_bytes=100)


@given(st.binary(max_size=300))
def test_no_bytes_break_the_form(body: bytes) -> None:
    with pytest.raises(LongdraftError):
        feed(b"--frontier\r\n" + body)
