"""The HTTP client against scripted answers: what users are told, and what is sent."""

import httpx
import pytest

from service.cli.client import Server, Unreachable
from service.cli.output import Failure


def server(handler):
    return Server("http://server.test", "secret", transport=httpx.MockTransport(handler))


def test_the_key_is_sent_and_json_comes_back():
    def handler(request):
        assert request.headers["authorization"] == "Bearer secret"
        assert request.url == "http://server.test/v1/batches?limit=3"
        return httpx.Response(200, json={"object": "list"})

    assert server(handler).get("/batches", limit=3, after=None) == {"object": "list"}


def test_an_error_shows_the_servers_message_and_status():
    def handler(request):
        return httpx.Response(404, json={"error": {"message": "No such batch.", "type": "x", "param": None, "code": "not_found"}})

    with pytest.raises(Failure, match=r"No such batch\. \(HTTP 404\)") as caught:
        server(handler).get("/batches/b")
    assert caught.value.code == "not_found"
    assert not isinstance(caught.value, Unreachable)


def test_a_refused_key_says_what_to_set():
    def handler(request):
        return httpx.Response(401, json={"error": {"message": "Incorrect API key provided.", "code": "invalid_api_key"}})

    with pytest.raises(Failure, match="LONGDRAFT_API_KEY"):
        server(handler).get("/batches")


def test_an_error_that_is_not_ours_is_shown_as_it_is():
    with pytest.raises(Unreachable, match=r"upstream died \(HTTP 502\)"):
        server(lambda request: httpx.Response(502, text="upstream died")).get("/batches")


def test_something_that_is_no_longdraft_server():
    with pytest.raises(Failure, match="is it a Longdraft server"):
        server(lambda request: httpx.Response(200, text="<html>")).get("/batches")


def test_nobody_there():
    def handler(request):
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(Unreachable, match="longdraft up"):
        server(handler).get("/batches")


def test_a_create_can_be_repeated_safely():
    keys = []

    def handler(request):
        keys.append(request.headers.get("idempotency-key"))
        return httpx.Response(200, json={})

    with server(handler) as client:
        client.post("/batches", {}, once=True)
        client.post("/batches", {}, once=True)
        client.post("/batches/b/cancel")
    assert None not in keys[:2]
    assert keys[0] != keys[1]
    assert keys[2] is None


def test_an_upload_is_streamed_with_its_length_and_reports_progress(tmp_path):
    job = tmp_path / "job.jsonl"
    job.write_bytes(b'{"custom_id": "a"}\n' * 100_000)
    seen = {}

    def handler(request):
        seen["length"] = int(request.headers["content-length"])
        seen["body"] = request.read()
        return httpx.Response(200, json={"id": "file-1"})

    progress = []
    assert server(handler).upload(job, progress.append) == {"id": "file-1"}
    assert seen["length"] == len(seen["body"])
    assert job.read_bytes() in seen["body"]
    assert b'name="purpose"' in seen["body"]
    assert progress == sorted(progress)
    assert progress[-1] == job.stat().st_size
    assert len(progress) > 3, "read in one go"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(Failure, match=r"absent\.jsonl: No such file"):
        server(lambda request: httpx.Response(200, json={})).upload(tmp_path / "absent.jsonl", lambda _: None)


def test_listing_follows_pages_and_stops_at_the_limit():
    ids = [f"batch_{number}" for number in range(250)]
    asked = []

    def handler(request):
        after, limit = request.url.params.get("after"), int(request.url.params["limit"])
        asked.append((after, limit))
        start = ids.index(after) + 1 if after else 0
        page = ids[start : start + limit]
        return httpx.Response(200, json={"data": [{"id": id} for id in page], "last_id": page[-1], "has_more": start + limit < 250})

    assert [batch["id"] for batch in server(handler).batches(130)] == ids[:130]
    assert asked == [(None, 100), ("batch_99", 30)]
    assert len(list(server(handler).batches(1000))) == 250
