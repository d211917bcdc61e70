"""Files by presigned URL: the API on a bucket whose server checks signatures, and on a folder."""

import hashlib
from datetime import timedelta

import httpx
import psycopg
import pytest

from service.adapters.blobs_s3 import open_s3
from service.adapters.memory import MemoryTaskQueue
from service.bootstrap import Services
from service.config import load_settings
from service.usecases.janitor import clean
from tests.integration.api_server import LINE, serve
from tests.integration.test_api_files import refused


@pytest.fixture
def bucketed(database, guarded, tmp_path):
    """The API of a deployment whose store is a bucket, and a tenant of it."""
    settings = load_settings({}, data_dir=tmp_path, limits={"max_file_bytes": 10_000})
    with serve(Services(settings, database, open_s3("bucket", "own", guarded), MemoryTaskQueue())) as server, server.tenant() as tenant:
        yield server, tenant


def announced(tenant, data=LINE, **changes):
    body = {"filename": "job.jsonl", "purpose": "batch", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | changes
    answer = tenant.http.post("/v1/files/upload_url", json={name: value for name, value in body.items() if value is not ...})
    assert answer.status_code == 200, answer.text
    return answer.json()


def put(signed, data=LINE):
    return httpx.request(signed["method"], signed["url"], content=data, headers=signed["headers"])


def test_put_register_run_and_download(bucketed):
    server, tenant = bucketed
    signed = announced(tenant, expires_after={"anchor": "created_at", "seconds": 3600})
    file_id = signed["file_id"]
    assert tenant.http.get(f"/v1/files/{file_id}").status_code == 404, "it is visible before it is registered"
    refused(tenant.http.post(f"/v1/files/{file_id}/register"), 409, code="conflict")
    assert put(signed).status_code == 200
    registered = tenant.http.post(f"/v1/files/{file_id}/register").json()
    assert (registered["id"], registered["bytes"], registered["filename"]) == (file_id, len(LINE), "job.jsonl")
    assert registered["expires_at"] == registered["created_at"] + 3600
    assert tenant.http.post(f"/v1/files/{file_id}/register").json() == registered, "a repeated register is another one"
    assert tenant.sdk().files.retrieve(file_id).bytes == len(LINE)
    assert tenant.create(file_id).status_code == 200
    download = tenant.http.get(f"/v1/files/{file_id}/download_url").json()
    got = httpx.get(download["url"])
    assert got.content == LINE == tenant.sdk().files.content(file_id).content
    assert [info.key for info in server.services.blobs.list("")] == [f"files/{file_id}/input.jsonl"]


def test_what_was_registered_cannot_be_changed_by_its_url(bucketed):
    _, tenant = bucketed
    signed = announced(tenant)
    put(signed)
    tenant.http.post(f"/v1/files/{signed['file_id']}/register")
    assert put(signed, LINE[::-1]).status_code == 200
    assert tenant.sdk().files.content(signed["file_id"]).content == LINE


def test_other_bytes_than_announced_are_no_file(bucketed):
    server, tenant = bucketed
    signed = announced(tenant)
    assert httpx.put(signed["url"], content=LINE + b"more").status_code == 403, "the URL is for another size"
    assert put(signed, LINE[::-1]).status_code == 200
    refused(tenant.http.post(f"/v1/files/{signed['file_id']}/register"), 409, param="sha256")
    assert tenant.http.get("/v1/files").json()["data"] == []
    put(signed)
    assert tenant.http.post(f"/v1/files/{signed['file_id']}/register").status_code == 200, "the right bytes came too late"
    assert not list(server.services.blobs.list("uploads/"))


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"filename": "../x"}, 400, "file"),
        ({"purpose": "assistants"}, 400, "purpose"),
        ({"bytes": 0}, 400, "bytes"),
        ({"bytes": "10"}, 400, "bytes"),
        ({"bytes": 10_001}, 413, "bytes"),
        ({"sha256": "AB"}, 400, "sha256"),
        ({"filename": ...}, 400, "filename"),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "expires_after.seconds"),
        ({"colour": 1}, 400, "colour"),
    ],
)
def test_announcements_that_are_refused(bucketed, changes, status, param):
    _, tenant = bucketed
    body = {"filename": "job.jsonl", "purpose": "batch", "bytes": 10} | changes
    answer = tenant.http.post("/v1/files/upload_url", json={name: value for name, value in body.items() if value is not ...})
    refused(answer, status, param=param)


def test_uploads_are_their_owners_alone(bucketed):
    server, tenant = bucketed
    signed = announced(tenant)
    put(signed)
    with server.tenant() as stranger:
        foreign = stranger.http.post(f"/v1/files/{signed['file_id']}/register")
        unknown = stranger.http.post("/v1/files/file-0/register")
        assert (foreign.status_code, foreign.content) == (404, unknown.content)
        tenant.http.post(f"/v1/files/{signed['file_id']}/register")
        assert stranger.http.get(f"/v1/files/{signed['file_id']}/download_url").status_code == 404


def test_what_was_put_and_never_registered_goes(bucketed, owner_url):
    server, tenant = bucketed
    signed = announced(tenant)
    put(signed)
    assert clean(server.services.database, server.services.blobs) == 0
    with psycopg.connect(owner_url) as connection:
        connection.execute("UPDATE pending_uploads SET expires_at = now() - interval '2 days'")
    assert clean(server.services.database, server.services.blobs, orphans_after=timedelta(0)) == 1
    assert list(server.services.blobs.list("")) == []
    assert tenant.http.post(f"/v1/files/{signed['file_id']}/register").status_code == 404


def test_a_folder_has_no_urls(api, tenant):
    file_id = tenant.upload()
    for answer in (
        tenant.http.post("/v1/files/upload_url", json={"filename": "a.jsonl", "purpose": "batch", "bytes": 5}),
        tenant.http.get(f"/v1/files/{file_id}/download_url"),
    ):
        refused(answer, 400, code="presigned_urls_unavailable")
        assert "POST /v1/files" in answer.json()["error"]["message"]
