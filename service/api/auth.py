"""Who is asking: `Authorization: Bearer <key>` on every route but health and the documentation."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from service.api.context import Context, context
from service.errors import Unauthenticated
from service.usecases.keys import Caller, authenticate

_bearer = HTTPBearer(auto_error=False, description="An API key of a project: `ld-...`")


async def reader(
    ctx: Annotated[Context, Depends(context)], credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Caller:
    """A caller with any scope. Raises Unauthenticated."""
    if credentials is None or not credentials.credentials:
        raise Unauthenticated("You did not provide an API key: send it as 'Authorization: Bearer <key>'.")
    return await run_in_threadpool(authenticate, ctx.database, credentials.credentials, pepper=ctx.settings.key_pepper)


async def writer(caller: Annotated[Caller, Depends(reader)]) -> Caller:
    """A caller who may change things. Raises Forbidden."""
    caller.require_write()
    return caller


Reader = Annotated[Caller, Depends(reader)]
Writer = Annotated[Caller, Depends(writer)]
