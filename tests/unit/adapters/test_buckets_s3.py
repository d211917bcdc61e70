"""Where users' buckets may lead."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from urllib3.exceptions import NewConnectionError

from service.adapters import public_addresses, s3_client
from service.adapters.buckets_s3 import S3Buckets
from service.adapters.public_addresses import is_public
from service.adapters.vault import Vault
from service.config import S3
from service.domain.account import BucketAccess
from service.errors import BucketRefused, Unavailable


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault("key", tmp_path / "none")


def access(vault: Vault, endpoint_url: str | None) -> BucketAccess:
    return BucketAccess("p", "AK", vault.seal("p", "secret"), endpoint_url)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255"),
        *("::1", "::", "fe80::1%eth0", "fd00:ec2::254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "ff02::1"),
    ],
)
def test_addresses_that_are_not(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://s3.example.com", "https://host"),
        ("ftp://s3.example.com", "https://host"),
        ("https://", "https://host"),
        ("https://user:hunter2@s3.example.com", "https://host"),
        ("https://s3.example.com/?x=1", "https://host"),
        ("https://127.0.0.1:9000", "not a public address"),
        ("https://[::1]", "not a public address"),
        ("https://169.254.169.254", "not a public address"),
        ("https://2130706433", "not a public address"),
        ("https://localhost", "not a public address"),
        ("https://host:port", "does not resolve"),
    ],
)
def test_endpoints_that_a_project_may_not_name(vault: Vault, url: str, why: str) -> None:
    buckets = S3Buckets(S3(), vault, own=None)
    with pytest.raises(BucketRefused, match=why) as refusal:
        buckets.check_endpoint(url)
    assert refusal.value.code == "endpoint_not_allowed"
    assert "hunter2" not in refusal.value.message
    with pytest.raises(BucketRefused):
        buckets.open("bucket", access(vault, url))


def test_the_operator_may_allow_them(vault: Vault) -> None:
    buckets = S3Buckets(S3(allow_private_endpoints=True), vault, own=None)
    buckets.check_endpoint("http://127.0.0.1:9000")
    with pytest.raises(BucketRefused):
        buckets.check_endpoint("file:///etc/passwd")


def test_a_name_that_leads_elsewhere_when_it_is_connected_to_gets_nothing(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: public while it is checked, loopback when the request goes out. Nobody may be connected to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        answers = iter(["8.8.8.8"])
        real = socket.getaddrinfo

        def rebound(host: str, *args: object, **options: object) -> object:
            if host != "s3.example.test":
                return real(host, *args, **options)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers, "127.0.0.1"), port))]

        monkeypatch.setattr(socket, "getaddrinfo", rebound)
        monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
        accepted = []
        server.settimeout(1.0)

        def accept() -> None:
            try:
                accepted.append(server.accept())
            except TimeoutError:
                return

        thread = threading.Thread(target=accept)
        thread.start()
        bucket = S3Buckets(S3(), vault, own=None).open("bucket", access(vault, f"https://s3.example.test:{port}"))
        with pytest.raises(Unavailable) as outage:
            bucket.head("key")
        thread.join()
    assert accepted == []
    assert any(isinstance(cause, public_addresses.PrivateAddress) for cause in _causes(outage.value))


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def test_the_address_that_was_judged_is_connected_to_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """One look-up for a connection, and TLS still asks for the name."""
    asked = []
    monkeypatch.setattr(s3_client, "public_address", lambda host, port: asked.append((host, port)) or "192.0.2.7")
    tried = []

    def refuse(address: tuple[str, int], *_: object, **__: object) -> socket.socket:
        tried.append(address)
        raise OSError("unreachable")

    monkeypatch.setattr("urllib3.util.connection.create_connection", refuse)
    settings = S3(endpoint_url="https://s3.example.test", access_key_id="a", secret_access_key="b", path_style=True)
    client = s3_client.s3_client(settings, attempts=1, guarded=True)
    (pool,) = client._endpoint.http_session._manager.pool_classes_by_scheme.values()
    connection = pool.ConnectionCls("s3.example.test", 443)
    with pytest.raises(NewConnectionError, match="unreachable"):
        connection.connect()
    assert (asked, tried, connection.host) == ([("s3.example.test", 443)], [("192.0.2.7", 443)], "s3.example.test")


def test_the_deployments_role_opens_what_the_operator_says(vault: Vault) -> None:
    buckets = S3Buckets(S3(role_buckets=("acme-*",)), vault, own=("acme-own", "blobs"))
    buckets.open("acme-data", None)
    with pytest.raises(BucketRefused, match="role_buckets"):
        buckets.open("other", None)
    shared = buckets.open("acme-own", None)
    for use in (shared.head, shared.open, shared.writer, shared.check_writable):
        with pytest.raises(BucketRefused, match="own objects"):
            use("blobs/files/file-1/input.jsonl")
    whole = S3Buckets(S3(), vault, own=("acme-own", "")).open("acme-own", None)
    with pytest.raises(BucketRefused):
        whole.head("anything")


def test_every_address_of_a_name_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(public_addresses.PrivateAddress, match=r"10\.0\.0\.1"):
        public_addresses.public_address("two.example.test", 443)
