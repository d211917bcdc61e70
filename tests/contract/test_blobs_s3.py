"""A bucket behind a network that fails: slow-downs, resets, lost replies, damaged bytes, and wrong credentials."""

from __future__ import annotations

import hashlib
import random
import threading
import tracemalloc
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from service.adapters.blobs_s3 import REOPEN_TRIES, S3BlobStore, open_s3
from service.config import S3
from service.errors import BlobCorrupt, BlobDenied, Unavailable
from tests.contract.fault_proxy import (
    FaultProxy,
    claim_success,
    cut_after,
    damage,
    error_inside_200,
    ignore_range,
    lose_reply,
    not_implemented,
    reset,
    slow_down,
)

PART = 5 << 20
SMALL, LARGE = b"small object", random.Random(0).randbytes(2 * PART + 100)
ATTEMPTS = 2


@pytest.fixture
def proxy(s3_url: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3_url) as proxy:
        yield proxy


@pytest.fixture
def store(proxy: FaultProxy, s3_settings: S3, s3_bucket: str) -> S3BlobStore:
    """Through the proxy, with few retries so that giving up is quick."""
    return open_s3(s3_bucket, "", s3_settings.model_copy(update={"endpoint_url": proxy.url}), attempts=ATTEMPTS)


@pytest.fixture
def direct(s3_settings: S3, s3_bucket: str) -> S3BlobStore:
    return open_s3(s3_bucket, "", s3_settings)


def content(store: S3BlobStore, key: str = "k") -> bytes:
    with store.open(key) as stream:
        return stream.read()


@pytest.mark.parametrize("fault", [slow_down, reset, lose_reply])
@pytest.mark.parametrize(
    ("data", "method", "part"),
    [(SMALL, "PUT", "/k"), (LARGE, "POST", "uploads"), (LARGE, "PUT", "partNumber=2"), (LARGE, "POST", "uploadId="), (SMALL, "HEAD", "/k")],
)
def test_a_request_that_fails_once_is_repeated(store: S3BlobStore, proxy: FaultProxy, fault, data: bytes, method: str, part: str) -> None:
    proxy.once(method, part, fault)
    store.put("k", data)
    assert proxy.faults == []
    assert content(store) == data


@pytest.mark.parametrize("data", [SMALL, LARGE])
def test_a_put_whose_every_reply_is_lost_is_found_to_be_done(store: S3BlobStore, proxy: FaultProxy, data: bytes) -> None:
    method, part = ("PUT", "/k") if data is SMALL else ("POST", "uploadId=")
    proxy.once(method, part, lose_reply, times=ATTEMPTS)
    assert store.put("k", data).bytes == len(data)
    assert content(store) == data


@pytest.mark.parametrize("data", [SMALL, LARGE])
def test_a_store_that_stays_away_is_an_outage_and_nothing_shows(
    store: S3BlobStore, direct: S3BlobStore, proxy: FaultProxy, data: bytes
) -> None:
    method, part = ("PUT", "/k") if data is SMALL else ("PUT", "partNumber=3")
    proxy.once(method, part, slow_down, times=ATTEMPTS)
    with pytest.raises(Unavailable, match="SlowDown"):
        store.put("k", data)
    assert direct.head("k") is None
    assert direct.discard_abandoned(timedelta(0)) == 0, "the parts were not given up"


def test_a_completion_that_says_200_and_means_an_error_is_repeated(store: S3BlobStore, proxy: FaultProxy) -> None:
    proxy.once("POST", "uploadId=", error_inside_200)
    store.put("k", LARGE)
    assert content(store) == LARGE


def test_a_completion_that_keeps_saying_200_and_meaning_an_error_is_an_outage(
    store: S3BlobStore, direct: S3BlobStore, proxy: FaultProxy
) -> None:
    proxy.once("POST", "uploadId=", error_inside_200, times=ATTEMPTS)
    with pytest.raises(Unavailable, match="InternalError"):
        store.put("k", LARGE)
    assert direct.head("k") is None


def test_a_success_that_stored_nothing_is_found_out(store: S3BlobStore, proxy: FaultProxy) -> None:
    proxy.once("PUT", "/k", claim_success)
    with pytest.raises(BlobCorrupt):
        store.put("k", SMALL)


@pytest.mark.parametrize("start", [0, 1000])
def test_a_stream_that_breaks_goes_on_where_it_broke(store: S3BlobStore, direct: S3BlobStore, proxy: FaultProxy, start: int) -> None:
    direct.put("k", LARGE)
    proxy.once("GET", "/k", cut_after(PART))
    proxy.once("GET", "/k", reset)
    proxy.once("GET", "/k", cut_after(100))
    with store.open("k", start=start) as stream:
        assert stream.read() == LARGE[start:]
    assert proxy.faults == []


def test_a_stream_that_keeps_breaking_is_an_outage(store: S3BlobStore, direct: S3BlobStore, proxy: FaultProxy) -> None:
    direct.put("k", LARGE)
    proxy.once("GET", "/k", cut_after(0), times=REOPEN_TRIES + 1)
    with pytest.raises(Unavailable), store.open("k") as stream:
        stream.read()


def test_a_stream_never_mixes_two_versions(store: S3BlobStore, direct: S3BlobStore, proxy: FaultProxy) -> None:
    direct.put("k", LARGE)
    proxy.once("GET", "/k", cut_after(PART))
    with store.open("k") as stream:
        stream.read(1000)
        direct.put("k", bytes(len(LARGE)))
        with pytest.raises(BlobCorrupt, match="replaced"):
            stream.read()


def test_abandoned_uploads_are_given_up(direct: S3BlobStore) -> None:
    writer = direct.writer("k")  # and never left: the process died
    writer.write(LARGE)
    # This server dates every upload back to 2010.
    assert direct.discard_abandoned(timedelta(days=100 * 365)) == 0
    assert direct.discard_abandoned(timedelta(hours=1)) == 1
    assert direct.discard_abandoned(timedelta(hours=1)) == 0


def test_writing_and_reading_take_memory_for_a_few_parts_only(direct: S3BlobStore, s3_settings: S3) -> None:
    """The server of this test runs in this process, so the sizes it keeps are taken out: writes go nowhere."""
    writer = direct.writer("k")
    writer._send_part = writer._buffer.clear  # type: ignore[method-assign]
    block = bytes(1 << 20)
    tracemalloc.start()
    for _ in range(100):
        writer.write(block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * PART


def test_no_bucket_and_no_server_say_so(s3_settings: S3) -> None:
    with pytest.raises(BlobDenied, match="bucket does not exist"):
        open_s3("missing", "", s3_settings).put("k", b"x")
    closed = s3_settings.model_copy(update={"endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(Unavailable, match="does not answer"):
        open_s3("any", "", closed, attempts=1).probe()


# --- what a store can do, and what is done where it cannot -----------------------------------------------------------------------


def test_a_probe_says_what_the_store_can_do(direct: S3BlobStore) -> None:
    found = direct.probe()
    assert [found[name] for name in ("conditional put", "multipart", "range", "presigned urls")] == ["yes"] * 4
    assert found["checks md5"] == "no", "this server stores damaged bytes; that is why what is stored is looked at"
    assert list(direct.list("")) == []


def test_of_many_creators_one_creates(direct: S3BlobStore) -> None:
    done: list[bool] = []
    threads = [threading.Thread(target=lambda n=n: done.append(direct.create("k", bytes([n])))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [False] * 7 + [True]
    before = content(direct)
    assert not direct.create("k", b"later")
    assert content(direct) == before


def test_without_conditional_puts_a_look_has_to_do(store: S3BlobStore, proxy: FaultProxy) -> None:
    proxy.once("PUT", "/k", not_implemented)
    assert store.create("k", b"first")
    assert not store.create("k", b"second")
    assert (content(store), proxy.faults) == (b"first", [])


def test_a_store_that_only_ignores_the_condition_is_found_out_by_the_probe(guarded: S3) -> None:
    store = open_s3("bucket", "", guarded)
    store.probe()
    assert (store.create("k", b"first"), store.create("k", b"second"), content(store)) == (True, False, b"first")


def test_without_multipart_a_large_object_goes_in_one_put(store: S3BlobStore, proxy: FaultProxy) -> None:
    """It is tried once; after that the store is known not to have it."""
    proxy.once("POST", "uploads", not_implemented)
    for key in ("k", "k2"):
        assert store.put(key, LARGE).bytes == len(LARGE)
        assert content(store, key) == LARGE
        found = store.head(key)
        assert found is not None
        assert found.sha256 == hashlib.sha256(LARGE).hexdigest()
    assert [line for line in proxy.seen if "uploads" in line or "partNumber" in line] == ["POST /" + store._bucket + "/k?uploads"]
    with store.writer("half") as writer:
        writer.write(LARGE)
    assert store.head("half") is None
    assert store.discard_abandoned(timedelta(0)) == 0


@pytest.mark.parametrize(("start", "length"), [(0, 5), (3, 4), (3, None), (PART, None), (len(LARGE) - 1, 10), (len(LARGE), None)])
def test_without_ranges_the_whole_is_read_and_the_rest_dropped(
    store: S3BlobStore, direct: S3BlobStore, proxy: FaultProxy, start: int, length: int | None
) -> None:
    direct.put("k", LARGE)
    proxy.once("GET", "/k", ignore_range, times=2)
    with store.open("k", start=start, length=length) as stream:
        assert stream.read() == LARGE[start : None if length is None else start + length]


def test_a_version_that_is_asked_for_is_the_one_that_is_read(direct: S3BlobStore) -> None:
    direct.put("k", b"one")
    one = direct.head("k")
    assert one is not None
    with direct.open("k", etag=one.etag) as stream:
        assert stream.read() == b"one"
    direct.put("k", b"two")
    with pytest.raises(BlobCorrupt, match="replaced"):
        direct.open("k", etag=one.etag)


def test_asking_for_leave_to_write_leaves_nothing(direct: S3BlobStore) -> None:
    direct.check_writable("folder/k")
    assert list(direct.list("")) == []
    assert direct.discard_abandoned(timedelta(0)) == 0


def test_presigned_urls_work_without_credentials_and_under_the_public_address(guarded: S3) -> None:
    """By a server that checks signatures; it knows itself by the name in the URL."""
    store = open_s3(
        "bucket", "prefix", guarded.model_copy(update={"public_endpoint_url": guarded.endpoint_url.replace("127.0.0.1", "localhost")})
    )
    put = store.presigned_put("some/key", size=len(SMALL), lifetime=timedelta(minutes=1))
    assert put.url.startswith("http://localhost:")
    assert httpx.put(put.url, content=SMALL, headers=put.headers).status_code == 200
    get = store.presigned_get("some/key", filename="ü.jsonl", lifetime=timedelta(minutes=1))
    assert httpx.get(get.url).content == SMALL == content(store, "some/key")
    assert httpx.put(put.url, content=SMALL + b"more").status_code == 403, "a URL for one size takes another"
    assert httpx.get(get.url.replace("some/key", "other/key")).status_code == 403
    assert httpx.get(get.url.partition("?")[0]).status_code in (400, 403)


# --- credentials: by a server that checks them ----------------------------------------------------------------------------------


def test_right_credentials_work(guarded: S3) -> None:
    store = open_s3("bucket", "prefix", guarded)
    found = store.probe()
    assert found["store"] == "s3"
    assert [found[name] for name in ("multipart", "range", "presigned urls", "checks md5", "conditional put")] == ["yes"] * 4 + ["no"]
    large = S3BlobStore(store._client, "bucket", "prefix", part_bytes=PART)
    large.put("k", LARGE)
    assert content(large) == LARGE


@pytest.mark.parametrize("data", [SMALL, LARGE])
def test_bytes_damaged_on_the_way_are_never_shown(guarded: S3, data: bytes) -> None:
    assert guarded.endpoint_url is not None
    with FaultProxy(guarded.endpoint_url) as proxy:
        store = open_s3("bucket", "", guarded.model_copy(update={"endpoint_url": proxy.url, "multipart_bytes": PART}), attempts=1)
        proxy.once("PUT", "/k", damage)
        with pytest.raises((BlobCorrupt, Unavailable)):
            store.put("k", data)
        assert store.head("k") is None


@pytest.mark.parametrize("wrong", [{"secret_access_key": "wrong"}, {"access_key_id": "wrong"}])
def test_wrong_credentials_are_refused_with_a_word_on_what_to_do(guarded: S3, wrong: dict[str, str]) -> None:
    store = open_s3("bucket", "", guarded.model_copy(update=wrong))
    uses = (lambda: store.put("k", b"x"), lambda: store.head("k"), lambda: store.open("k"), store.probe, lambda: list(store.list("")))
    for use in (*uses, lambda: store.create("k", b"x"), lambda: store.check_writable("k")):
        with pytest.raises(BlobDenied, match="check the key"):
            use()


def test_no_credentials_at_all(guarded: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    store = open_s3("bucket", "", guarded.model_copy(update={"access_key_id": None, "secret_access_key": None}))
    with pytest.raises(BlobDenied, match=r"s3\.access_key_id"):
        store.put("k", b"x")
