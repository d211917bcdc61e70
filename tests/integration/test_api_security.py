"""Keys, scopes, owners, error shapes: on every route, found by walking the application."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

import httpx
import pytest
from fastapi.routing import APIRoute
from openapi_spec_validator import validate
from starlette.routing import BaseRoute
from structlog.testing import capture_logs

from service.api.app import create_app
from service.domain.ids import new_batch_id, new_file_id
from service.errors import Conflict, InvalidRequest, NotFound, Unauthenticated, Unavailable
from service.usecases.keys import authenticate, create_key, digest_of, list_keys, register_key, revoke_key
from tests.integration.api_server import ApiServer, Tenant
from tests.integration.test_api_files import refused

OPEN_ROUTES = {"/healthz", "/readyz", "/docs"}


def routes(api: ApiServer) -> list[tuple[str, str]]:
    """(method, path template) of everything that the application answers."""
    return [(method, route.path) for route in _walk(create_app(api.services).routes) for method in route.methods or ()]


def _walk(found: Sequence[BaseRoute]) -> Iterator[APIRoute]:
    for route in found:
        if isinstance(route, APIRoute):
            yield route
        elif hasattr(route, "original_router"):  # FastAPI keeps included routers as they are
            yield from _walk(route.original_router.routes)


def filled(path: str, **ids: str) -> str:
    return re.sub(r"{(\w+)(:path)?}", lambda match: ids[match[1]], path)


def test_every_route_but_health_and_documentation_needs_a_key(api: ApiServer) -> None:
    seen = set()
    with httpx.Client(base_url=api.url) as anyone:
        for method, path in routes(api):
            if path in OPEN_ROUTES:
                continue
            seen.add(path)
            for credentials in (None, b"Bearer ld-wrong", b"Basic YTpi", b"Bearer", "Bearer \xe4".encode()):
                headers = {b"authorization": credentials} if credentials else None
                answer = anyone.request(method, filled(path, file_id="file-1", batch_id="batch_1", model="m"), headers=headers)
                refused(answer, 401, code="invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
    assert {"/v1/files", "/v1/files/{file_id}/content", "/v1/batches/{batch_id}/cancel", "/v1/models"} <= seen


def test_a_foreign_id_answers_like_an_unknown_one_on_every_route(api: ApiServer, tenant: Tenant, stranger: Tenant) -> None:
    owned = {"file_id": tenant.upload(), "batch_id": tenant.create().json()["id"]}
    unknown = {"file_id": new_file_id(), "batch_id": new_batch_id()}
    tried = 0
    for method, path in routes(api):
        if "_id}" not in path:
            continue
        foreign, missing = (stranger.http.request(method, filled(path, **ids)) for ids in (owned, unknown))
        assert (foreign.status_code, missing.status_code) == (404, 404), (method, path)
        assert foreign.content == missing.content, (method, path)
        assert _without_id(foreign) == _without_id(missing), (method, path)
        tried += 1
    assert tried >= 8
    assert tenant.http.get(f"/v1/files/{owned['file_id']}").status_code == 200
    assert tenant.http.get(f"/v1/batches/{owned['batch_id']}").json()["status"] == "validating"


def test_foreign_ids_in_bodies_and_cursors_answer_like_unknown_ones(tenant: Tenant, stranger: Tenant) -> None:
    file_id, batch_id = tenant.upload(), tenant.create().json()["id"]
    nowhere = new_file_id(), new_batch_id()
    create = [stranger.create(candidate) for candidate in (file_id, nowhere[0])]
    files = [stranger.http.get("/v1/files", params={"after": candidate}) for candidate in (file_id, nowhere[0])]
    batches = [stranger.http.get("/v1/batches", params={"after": candidate}) for candidate in (batch_id, nowhere[1])]
    for status, (foreign, missing) in ((404, create), (400, files), (400, batches)):
        assert (foreign.status_code, missing.status_code) == (status, status)
        said = foreign.text.replace(file_id, "ID").replace(batch_id, "ID")
        assert said == missing.text.replace(nowhere[0], "ID").replace(nowhere[1], "ID")


def test_listings_show_the_own_project_only(tenant: Tenant, stranger: Tenant) -> None:
    tenant.create()
    assert stranger.http.get("/v1/files").json()["data"] == []
    assert stranger.http.get("/v1/batches").json()["data"] == []


def test_a_read_key_reads_and_nothing_else(api: ApiServer, tenant: Tenant) -> None:
    ids = {"file_id": tenant.upload(), "batch_id": tenant.create().json()["id"], "model": "smollm2-135m"}
    with api.tenant(tenant.project_id, scopes=("read",)) as reader:
        for method, path in routes(api):
            asked = {"start_time": 0} if path.startswith("/v1/organization/") else {}
            answer = reader.http.request(method, filled(path, **ids), params=asked)
            if method == "GET":
                # This server's store is a folder, to which there are no URLs.
                allowed = {"presigned_urls_unavailable"} if path.endswith("/download_url") else set()
                assert answer.status_code == 200 or answer.json()["error"]["code"] in allowed, (method, path, answer.text)
            else:
                refused(answer, 403, code="insufficient_scope")


def test_a_revoked_key_is_refused_at_once(api: ApiServer, tenant: Tenant) -> None:
    assert tenant.http.get("/v1/files").status_code == 200
    revoke_key(api.services.database, tenant.key.id)
    refused(tenant.http.get("/v1/files"), 401, code="invalid_api_key")
    with pytest.raises(NotFound):
        revoke_key(api.services.database, tenant.key.id)


# --- keys -----------------------------------------------------------------------------------------------------------------------


def test_a_secret_is_random_shown_once_and_never_stored(api: ApiServer) -> None:
    database = api.services.database
    made = [create_key(database, "default", f"key {n}", pepper="p") for n in range(3)]
    assert len({secret for _, secret in made}) == 3
    for key, secret in made:
        assert re.fullmatch(r"ld-[A-Za-z0-9_-]{43}", secret)
        assert (key.prefix, key.digest) == (secret[:11], digest_of(secret, "p"))
    for key in list_keys(database, "default"):
        assert not any(secret[11:] in repr(key) for _, secret in made)


def test_the_pepper_is_part_of_a_key(api: ApiServer) -> None:
    key, secret = create_key(api.services.database, "default", "peppered", pepper="one")
    assert authenticate(api.services.database, secret, pepper="one").key_id == key.id
    with pytest.raises(Unauthenticated):
        authenticate(api.services.database, secret, pepper="two")


def test_use_is_noted(api: ApiServer) -> None:
    database = api.services.database
    key, secret = create_key(database, "default", "used", pepper="")
    authenticate(database, secret, pepper="")
    assert next(found for found in list_keys(database) if found.id == key.id).last_used_at is not None


def test_a_chosen_key_works_and_registering_it_again_changes_nothing(api: ApiServer) -> None:
    database = api.services.database
    first = register_key(database, "default", "my-own-secret", "chosen", pepper="")
    assert register_key(database, "default", "my-own-secret", "again", pepper="").id == first.id
    assert authenticate(database, "my-own-secret", pepper="").project_id == first.project_id
    assert "my-own" not in first.prefix


def test_a_chosen_key_cannot_be_weak_revived_or_shared(api: ApiServer) -> None:
    database = api.services.database
    for bad in ("", "short", "with space in it", "ümläute-sind-keine"):
        with pytest.raises(InvalidRequest):
            register_key(database, "default", bad, "bad", pepper="")
    with database.begin() as uow:
        uow.accounts.add_project("other")
    key = register_key(database, "default", "another-own-secret", "chosen", pepper="")
    with pytest.raises(Conflict, match="another project"):
        register_key(database, "other", "another-own-secret", "stolen", pepper="")
    revoke_key(database, key.id)
    with pytest.raises(Conflict, match="revoked"):
        register_key(database, "default", "another-own-secret", "revived", pepper="")
    with pytest.raises(NotFound):
        register_key(database, "no such project", "another-own-secret-2", "lost", pepper="")


# --- errors, documentation, health ------------------------------------------------------------------------------------------------


def test_unknown_urls_and_methods_have_the_error_shape(tenant: Tenant) -> None:
    refused(tenant.http.get("/"), 404, code="unknown_url")
    refused(tenant.http.post("/v1/uploads"), 404, code="unknown_url")
    refused(tenant.http.post("/v1/responses", json={}), 404, code="unknown_url")
    refused(tenant.http.get("/v1/files/%00"), 404)
    answer = tenant.http.patch("/v1/files")
    refused(answer, 405, code="method_not_allowed")
    assert answer.headers["allow"]


def test_every_answer_has_its_own_request_id(tenant: Tenant) -> None:
    answers = [tenant.http.get(path) for path in ("/v1/files", "/v1/files", "/nowhere", "/healthz")]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 4
    assert all(re.fullmatch(r"req_[0-9a-f]{32}", request_id) for request_id in ids)


def test_a_bug_is_logged_and_not_shown(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = ZeroDivisionError("secret detail")

    def explode(*_args: object, **_options: object) -> object:
        raise bug

    monkeypatch.setattr("service.usecases.files.get_file", explode)
    with capture_logs() as logged:
        answer = tenant.http.get("/v1/files/file-1")
    refused(answer, 500, code="internal_error", type="server_error")
    assert "secret detail" not in answer.text
    assert [entry["exc_info"] for entry in logged if entry.get("request_id") == answer.headers["x-request-id"] and "exc_info" in entry] == [
        bug
    ]


def test_an_outage_is_503_and_says_when_to_come_back(api: ApiServer, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_args: object, **_options: object) -> object:
        raise Unavailable("The database does not answer.")

    assert httpx.get(f"{api.url}/readyz").json() == {"status": "ready", "database": "ok", "blobs": "ok"}
    monkeypatch.setattr(api.services.database, "begin", gone)
    answer = tenant.http.get("/v1/files")
    refused(answer, 503, code="service_unavailable")
    assert answer.headers["retry-after"] == "1"
    assert httpx.get(f"{api.url}/healthz").json() == {"status": "ok"}
    refused(httpx.get(f"{api.url}/readyz"), 503)


def test_the_documentation_is_valid_complete_and_self_contained(api: ApiServer) -> None:
    spec = httpx.get(f"{api.url}/openapi.json").json()
    validate(spec)
    page = httpx.get(f"{api.url}/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text
    assert not re.search(r"(src|href)\s*=\s*['\"]?(https?:)?//", page.text)
    for method, path in routes(api):
        if path != "/docs":
            assert method.lower() in spec["paths"][path.replace(":path", "")]
            assert path.replace(":path", "") in page.text
    assert '"422"' not in json.dumps(spec)
    for name in re.findall(r'"\$ref": "([^"]+)"', json.dumps(spec)):
        prefix, _, schema = name.rpartition("/")
        assert (prefix, schema in spec["components"]["schemas"]) == ("#/components/schemas", True), name
        assert f"id='{schema}'" in page.text


def _without_id(answer: httpx.Response) -> list[tuple[str, str]]:
    return [(name, value) for name, value in answer.headers.multi_items() if name not in ("x-request-id", "date")]
