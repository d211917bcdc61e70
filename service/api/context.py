"""What the routes work with, put on the application once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from service.config import Settings
from service.ports import BlobStore, Database, UserBuckets
from service.usecases.estimate import Tokenizers
from service.usecases.status import BatchViews


@dataclass(frozen=True)
class Context:
    """Settings and ports, and the one thing the API remembers between requests."""

    settings: Settings
    database: Database
    blobs: BlobStore
    buckets: UserBuckets
    tokenizers: Tokenizers
    views: BatchViews = field(default_factory=BatchViews)


def context(request: Request) -> Context:
    """FastAPI dependency."""
    found: Context = request.app.state.context
    return found


Ctx = Annotated[Context, Depends(context)]
