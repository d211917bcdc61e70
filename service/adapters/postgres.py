"""Small facts about talking to PostgreSQL that several adapters share."""

from __future__ import annotations

import hashlib


def sqlalchemy_url(url: str) -> str:
    """`postgres://` and `postgresql://` mean psycopg 3 here."""
    scheme, separator, rest = url.partition("://")
    return f"postgresql+psycopg{separator}{rest}" if scheme in ("postgres", "postgresql") else url


def advisory_key(name: str) -> int:
    """A signed 64-bit key for PostgreSQL's advisory locks."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
