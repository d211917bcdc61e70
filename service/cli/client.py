"""The command line's HTTP client: OpenAI's routes and Longdraft's own, errors as one clear line."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from service.cli.output import Failure

if TYPE_CHECKING:
    import httpx

_TIMEOUT_SECONDS = 60.0
_CHUNK = 1 << 20


class Server:
    """One server, one key. Every method raises Failure with a message that a user can act on."""

    def __init__(self, url: str, key: str | None, *, transport: httpx.BaseTransport | None = None) -> None:
        import httpx

        self.url = url
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=f"{url}/v1", headers=headers, timeout=_TIMEOUT_SECONDS, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        return self._json("GET", path, params={name: value for name, value in params.items() if value is not None})

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, once: bool = False) -> dict[str, Any]:
        """`once` sends an idempotency key, so that the request may be repeated safely."""
        headers = {"idempotency-key": uuid.uuid4().hex} if once else {}
        return self._json("POST", path, json=body, headers=headers)

    def delete(self, path: str) -> dict[str, Any]:
        return self._json("DELETE", path)

    def upload(self, path: Path, progress: Callable[[int], None]) -> dict[str, Any]:
        """Streams a JSONL file; `progress` gets the bytes that were read so far."""
        try:
            with path.open("rb") as file:
                parts = {"file": (path.name, _Watched(file, progress), "application/jsonl")}
                return self._json("POST", "/files", data={"purpose": "batch"}, files=parts)
        except OSError as error:
            raise Failure(f"Cannot read {path}: {error.strerror or error}.") from None

    def download(self, file_id: str) -> Iterator[bytes]:
        """The bytes of a file, in portions."""
        with self._translated(), self._http.stream("GET", f"/files/{file_id}/content") as response:
            _check(response)
            yield from response.iter_bytes(_CHUNK)

    def batches(self, limit: int) -> Iterator[dict[str, Any]]:
        """Newest first, at most `limit`, page by page."""
        after = None
        while limit > 0:
            page = self.get("/batches", limit=min(limit, 100), after=after)
            yield from page["data"]
            limit -= len(page["data"])
            after = page["last_id"]
            if not page["has_more"]:
                return

    def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        with self._translated():
            response = self._http.request(method, path, **request)
            _check(response)
            try:
                answer: dict[str, Any] = response.json()
            except ValueError:
                raise Failure(f"{self.url} answered {path} with something that is not JSON: is it a Longdraft server?") from None
            return answer

    def _translated(self) -> _Translated:
        return _Translated(self.url)


class _Translated:
    """Turns httpx's transport errors into a Failure that names the server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        import httpx

        if isinstance(error, httpx.ConnectError):
            raise Unreachable(f"No server answers at {self._url}. Start one with `longdraft up`, or name yours in LONGDRAFT_URL.") from None
        if isinstance(error, httpx.HTTPError | httpx.InvalidURL):
            raise Unreachable(f"The connection to {self._url} failed: {error or type(error).__name__}.") from None


class Unreachable(Failure):
    """The server did not answer at all: trying again later may help."""

    code, status = "unreachable", 503


class _Watched:
    """A file whose reads are counted."""

    def __init__(self, file: IO[bytes], progress: Callable[[int], None]) -> None:
        self._file, self._progress = file, progress

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._progress(self._file.tell())
        return data

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read(_CHUNK):
            yield data

    def fileno(self) -> int:
        """httpx asks for the size this way, so the upload is not chunked."""
        return self._file.fileno()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _check(response: httpx.Response) -> None:
    """Raises Failure (Unreachable from 500 on) with OpenAI's error message."""
    if response.status_code < 400:
        return
    response.read()
    try:
        error = response.json()["error"]
        message, code = error["message"], error.get("code")
    except (ValueError, KeyError, TypeError):
        message, code = response.text[:200] or response.reason_phrase, None
    if response.status_code == 401:
        message += " Set LONGDRAFT_API_KEY to the key that `longdraft up` prints."
    kind = Unreachable if response.status_code >= 500 else Failure
    raise kind(f"{message} (HTTP {response.status_code})", code=code)
