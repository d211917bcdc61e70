"""Uploads that go wrong leave nothing behind; downloads answer ranges; listings refuse nonsense."""

from __future__ import annotations

import gzip
import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import httpx
import pytest

from service.config import Limits
from service.errors import Unavailable
from service.ports import UnitOfWork
from tests.integration.api_server import LINE, ApiServer, Tenant, serve

BOUNDARY = "frontier"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    named = f'; filename="{filename}"' if filename is not None else ""
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content + b"\r\n"


FILE, PURPOSE, END = part("file", LINE, "in.jsonl"), part("purpose", b"batch"), f"--{BOUNDARY}--\r\n".encode()


def refused(answer: httpx.Response, status: int, **expected: Any) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"}), answer.text
    assert {name: error[name] for name in expected} == expected
    assert error["message"]


def test_parts_come_in_any_order(tenant: Tenant) -> None:
    for body in (FILE + PURPOSE + END, PURPOSE + FILE + END):
        answer = tenant.http.post("/v1/files", content=body, headers=FORM)
        assert answer.status_code == 200
        assert tenant.http.get(f"/v1/files/{answer.json()['id']}/content").content == LINE


def test_the_stored_row_knows_size_and_hash(api: ApiServer, tenant: Tenant) -> None:
    content = LINE * 5000
    file_id = tenant.upload(content)
    with api.services.database.begin() as uow:
        file = uow.files.get(tenant.project_id, file_id)
    assert file is not None
    assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())


BAD_UPLOADS: dict[str, tuple[bytes, dict[str, str], int, str | None]] = {
    "no purpose": (FILE + END, FORM, 400, "purpose"),
    "wrong purpose": (FILE + part("purpose", b"fine-tune") + END, FORM, 400, "purpose"),
    "wrong purpose first": (part("purpose", b"vision") + FILE + END, FORM, 400, "purpose"),
    "no file": (PURPOSE + END, FORM, 400, "file"),
    "two files": (FILE + FILE + PURPOSE + END, FORM, 400, "file"),
    "traversal": (part("file", LINE, "../../etc/passwd") + PURPOSE + END, FORM, 400, "file"),
    "absolute path": (part("file", LINE, "/etc/passwd") + PURPOSE + END, FORM, 400, "file"),
    "NUL in the name": (part("file", LINE, "a\0b") + PURPOSE + END, FORM, 400, "file"),
    "513 characters": (part("file", LINE, "x" * 513) + PURPOSE + END, FORM, 400, "file"),
    "empty name": (part("file", LINE, "") + PURPOSE + END, FORM, 400, "file"),
    "name is not UTF-8": (
        PURPOSE + b'--frontier\r\nContent-Disposition: form-data; name="file"; filename="\xff"\r\n\r\nx\r\n' + END,
        FORM,
        400,
        None,
    ),
    "half an expiry": (FILE + PURPOSE + part("expires_after[seconds]", b"3600") + END, FORM, 400, "expires_after[anchor]"),
    "expiry too short": (
        FILE + PURPOSE + part("expires_after[anchor]", b"created_at") + part("expires_after[seconds]", b"1") + END,
        FORM,
        400,
        "expires_after[seconds]",
    ),
    "unknown field": (FILE + PURPOSE + part("color", b"red") + END, FORM, 400, "color"),
    "cut short": (FILE + PURPOSE, FORM, 400, None),
    "not multipart": (b'{"purpose": "batch"}', {"content-type": "application/json"}, 415, None),
    "no boundary": (FILE + PURPOSE + END, {"content-type": "multipart/form-data"}, 400, None),
    "empty body": (b"", FORM, 400, None),
    "compressed": (gzip.compress(FILE + PURPOSE + END), FORM | {"content-encoding": "gzip"}, 415, None),
}


@pytest.mark.parametrize("case", BAD_UPLOADS)
def test_a_bad_upload_is_refused_and_leaves_nothing(api: ApiServer, tenant: Tenant, case: str) -> None:
    before = api.stored()
    body, headers, status, param = BAD_UPLOADS[case]
    refused(tenant.http.post("/v1/files", content=body, headers=headers), status, param=param)
    assert api.stored() == before
    assert tenant.http.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize("declared", [True, False], ids=["content-length", "chunked"])
def test_over_the_limit_is_413_and_the_rest_is_not_waited_for(api: ApiServer, tenant: Tenant, declared: bool) -> None:
    before = api.stored()
    limit = api.services.settings.limits.max_file_bytes
    body = part("file", b"x" * (limit + 1), "big.jsonl") + PURPOSE + END
    sent = body if declared else iter([body[: limit // 2], body[limit // 2 :]])
    refused(tenant.http.post("/v1/files", content=sent, headers=FORM), 413, param="file", code="too_large")
    assert api.stored() == before


def test_the_limit_itself_is_allowed(api: ApiServer, tenant: Tenant) -> None:
    limit = api.services.settings.limits.max_file_bytes
    assert tenant.http.get(f"/v1/files/{tenant.upload(b'x' * limit)}").json()["bytes"] == limit


def test_a_declared_giant_is_refused_before_its_first_byte(api: ApiServer, tenant: Tenant) -> None:
    before = api.stored()
    with _raw_request(tenant, content_length=10**12) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
    assert api.stored() == before


def test_a_content_length_that_promises_too_little_is_400(api: ApiServer, tenant: Tenant) -> None:
    before = api.stored()
    body = FILE + PURPOSE + END
    with _raw_request(tenant, content_length=len(body) - 10) as connection:
        connection.sendall(body)
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert api.stored() == before


def test_a_client_that_goes_away_leaves_nothing(api: ApiServer, tenant: Tenant) -> None:
    before = api.stored()
    with _raw_request(tenant, content_length=900_000) as connection:
        connection.sendall(part("file", LINE * 4000, "in.jsonl"))
    # The server has nothing to answer; a later request of the same tenant is served, and the object is gone by then or soon after.
    assert tenant.http.get("/v1/files").json()["data"] == []
    _until(lambda: api.stored() == before)


def test_a_client_that_stalls_is_given_up(api: ApiServer, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    before = api.stored()
    monkeypatch.setattr("service.api.uploads.IDLE_SECONDS", 0.2)
    with _raw_request(tenant, content_length=900_000) as connection:
        connection.sendall(part("file", LINE * 4000, "in.jsonl"))
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
    assert api.stored() == before


def test_nothing_stays_where_the_database_refuses_the_row(api: ApiServer, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    before = api.stored()
    real = api.services.database.begin
    failing = {"left": 1}

    def begin() -> Any:
        if failing["left"] and any("/files/" in path for path in api.stored() - before):
            failing["left"] = 0
            raise Unavailable("gone for a moment")
        return real()

    monkeypatch.setattr(api.services.database, "begin", begin)
    answer = tenant.http.post("/v1/files", content=FILE + PURPOSE + END, headers=FORM)
    refused(answer, 503, code="service_unavailable")
    assert answer.headers["retry-after"] == "1"
    assert failing["left"] == 0
    assert api.stored() == before


def test_a_commit_whose_answer_got_lost_is_found_again(api: ApiServer, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real, lost = api.stored(), api.services.database.begin, {"left": 1}

    @contextmanager
    def begin() -> Iterator[UnitOfWork]:
        with real() as uow:
            yield uow
        if lost["left"] and any("/files/" in path for path in api.stored() - before):
            lost["left"] = 0
            raise Unavailable("the connection broke after COMMIT was sent")

    monkeypatch.setattr(api.services.database, "begin", begin)
    file_id = tenant.upload()
    assert lost["left"] == 0
    assert tenant.http.get(f"/v1/files/{file_id}/content").content == LINE


@pytest.mark.parametrize(
    ("asked", "expected", "content_range"),
    [
        ("bytes=0-3", slice(0, 4), "bytes 0-3/{size}"),
        ("bytes=10-", slice(10, None), "bytes 10-{last}/{size}"),
        ("bytes=-7", slice(-7, None), "bytes {tail}-{last}/{size}"),
    ],
)
def test_a_range_of_a_file(tenant: Tenant, asked: str, expected: slice, content_range: str) -> None:
    content = bytes(range(256)) * 10
    file_id = tenant.upload(content)
    answer = tenant.http.get(f"/v1/files/{file_id}/content", headers={"range": asked})
    assert (answer.status_code, answer.content) == (206, content[expected])
    size = len(content)
    assert answer.headers["content-range"] == content_range.format(size=size, last=size - 1, tail=size - 7)


def test_a_range_outside_the_file_is_416(tenant: Tenant) -> None:
    answer = tenant.http.get(f"/v1/files/{tenant.upload(b'12345')}/content", headers={"range": "bytes=5-"})
    refused(answer, 416, code="range_not_satisfiable")
    assert answer.headers["content-range"] == "bytes */5"


def test_if_range_falls_back_to_the_whole_file(tenant: Tenant) -> None:
    url = f"/v1/files/{tenant.upload(b'12345')}/content"
    etag = tenant.http.get(url).headers["etag"]
    assert tenant.http.get(url, headers={"range": "bytes=0-1", "if-range": etag}).content == b"12"
    assert tenant.http.get(url, headers={"range": "bytes=0-1", "if-range": '"other"'}).content == b"12345"


def test_an_empty_file_downloads(tenant: Tenant) -> None:
    answer = tenant.http.get(f"/v1/files/{tenant.upload(b'')}/content")
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_hostile_name_stays_inside_its_header(tenant: Tenant) -> None:
    name = 'a"; filename="evil.exe'
    answer = tenant.http.get(f"/v1/files/{tenant.upload(filename=name)}/content")
    assert answer.headers["content-disposition"].startswith("attachment; filename*=UTF-8''")
    assert "evil.exe" in answer.headers["content-disposition"]
    assert '"' not in answer.headers["content-disposition"]


def test_an_expired_file_is_gone(api: ApiServer, tenant: Tenant) -> None:
    with api.services.database.begin() as uow:
        now = uow.now
    file = api.put_file(tenant.project_id, b"old", expires_at=now - timedelta(seconds=1))
    unknown = tenant.http.get("/v1/files/file-unknown").content
    for method, path in [("GET", ""), ("GET", "/content"), ("DELETE", "")]:
        answer = tenant.http.request(method, f"/v1/files/{file.id}{path}")
        assert (answer.status_code, answer.content) == (404, unknown)
    assert tenant.http.get("/v1/files").json()["data"] == []


def test_the_input_of_an_open_batch_cannot_be_deleted(tenant: Tenant) -> None:
    file_id = tenant.upload()
    batch_id = tenant.create(file_id).json()["id"]
    answer = tenant.http.delete(f"/v1/files/{file_id}")
    refused(answer, 409, param="file_id")
    assert answer.headers["x-should-retry"] == "false"
    assert tenant.http.get(f"/v1/batches/{batch_id}").json()["status"] == "validating"
    assert tenant.http.get(f"/v1/files/{file_id}").status_code == 200


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=10001", "limit=x", "limit=-1", "limit=1e3", "order=up", "purpose=x", "after=file-unknown", "after=%00", "after=a b"],
)
def test_a_listing_refuses_bad_parameters(tenant: Tenant, query: str) -> None:
    refused(tenant.http.get(f"/v1/files?{query}"), 400, param=query.split("=")[0])


@pytest.fixture
def small_limit_api(api: ApiServer) -> Iterator[ApiServer]:
    """The same services behind a limit of 1,000 bytes a JSON body and 2,000 a file."""
    limits = Limits(max_body_bytes=1000, max_file_bytes=2000)
    settings = api.services.settings.model_copy(update={"limits": limits})
    with serve(type(api.services)(**(vars_of(api.services) | {"settings": settings}))) as server:
        yield server


def vars_of(services: Any) -> dict[str, Any]:
    return {name: getattr(services, name) for name in services.__dataclass_fields__}


def test_limits_come_from_the_settings(small_limit_api: ApiServer) -> None:
    with small_limit_api.tenant() as tenant:
        tenant.upload(b"x" * 2000)
        refused(tenant.http.post("/v1/files", content=part("file", b"x" * 2001, "a") + PURPOSE + END, headers=FORM), 413)
        refused(tenant.create("file-1", metadata={"a": "x" * 500, "b": "y" * 500}), 413, code="too_large")
        chunked = tenant.http.post("/v1/batches", content=iter([b'{"metadata": "', b"x" * 2000, b'"}']))
        refused(chunked, 413, code="too_large")


def _raw_request(tenant: Tenant, *, content_length: int) -> socket.socket:
    """A connection on which the head of an upload was sent, with any Content-Length."""
    url = httpx.URL(tenant.url)
    connection = socket.create_connection((url.host, url.port or 80), timeout=10)
    head = [
        "POST /v1/files HTTP/1.1",
        f"Host: {url.host}",
        f"Authorization: Bearer {tenant.secret}",
        f"Content-Type: {FORM['content-type']}",
        f"Content-Length: {content_length}",
    ]
    connection.sendall("\r\n".join([*head, "", ""]).encode())
    return connection


def _until(condition: Callable[[], bool]) -> None:
    """Waits for what the server does after the client left; pytest's own time limit ends a test that waits in vain."""
    while not condition():
        time.sleep(0.02)
