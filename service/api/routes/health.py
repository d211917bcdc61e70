"""Liveness and readiness, without a key."""

from __future__ import annotations

from fastapi import APIRouter

from service.api.context import Ctx
from service.api.wire import ErrorObject
from service.usecases.readiness import parts_answer

router = APIRouter(tags=["Health"])


@router.get("/healthz", summary="Is the process alive?")
def live() -> dict[str, str]:
    """Answers as long as the process does; looks at nothing else."""
    return {"status": "ok"}


@router.get("/readyz", summary="Can requests be served?", responses={503: {"model": ErrorObject}})
def ready(ctx: Ctx) -> dict[str, str]:
    """Asks the database and the object store; 503 names the one that does not answer."""
    parts_answer(ctx.database, ctx.blobs)
    return {"status": "ready", "database": "ok", "blobs": "ok"}
