"""Small facts about talking to PostgreSQL that several adapters share."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, CursorResult, Select, text

READ_ROWS = 2000
"""Rows a server-side cursor fetches at a time."""
READ_SECONDS = 600
"""How long a transaction may ask for nothing once it streams: what is read may go on to a slow object store, a part at a time."""

_OPEN_STREAMS = "longdraft.streams"


def sqlalchemy_url(url: str) -> str:
    """`postgres://` and `postgresql://` mean psycopg 3 here."""
    scheme, separator, rest = url.partition("://")
    return f"postgresql+psycopg{separator}{rest}" if scheme in ("postgres", "postgresql") else url


def advisory_key(name: str) -> int:
    """A signed 64-bit key for PostgreSQL's advisory locks."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)


def stream(connection: Connection, query: Select[Any]) -> Iterator[Any]:
    """Rows through a server-side cursor. Other statements may run between reads, COPY may not."""
    connection.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{READ_SECONDS}s'"))
    with connection.execute(query, execution_options={"yield_per": READ_ROWS}) as result:
        streams: set[CursorResult[Any]] = connection.info.setdefault(_OPEN_STREAMS, set())
        streams.add(result)
        try:
            yield from result
        finally:
            streams.discard(result)


@contextlib.contextmanager
def closing_streams(connection: Connection) -> Iterator[None]:
    """Closes what a block left open. A generator that an exception left half read is otherwise closed whenever it is collected: by a
    statement in the middle of whatever transaction the pooled connection serves by then.
    """
    streams: set[CursorResult[Any]] = connection.info.setdefault(_OPEN_STREAMS, set())
    try:
        yield
    finally:
        if not connection.invalidated:
            for result in list(streams):
                result.close()
        streams.clear()
