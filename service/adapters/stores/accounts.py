"""Projects and API keys."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import Connection, func, select, update
from sqlalchemy.dialects.postgresql import insert

from service.adapters.tables import api_keys, projects
from service.domain.account import ApiKey, Project
from service.domain.ids import new_project_id
from service.errors import Conflict

TOUCH_EVERY = timedelta(minutes=1)


class Accounts:
    """ports.AccountStore on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add_project(self, name: str) -> Project:
        new = insert(projects).values(id=new_project_id(), name=name).on_conflict_do_nothing(index_elements=["name"]).returning(projects)
        row = self._connection.execute(new).one_or_none()
        if row is None:
            raise Conflict(f"A project named {name!r} exists already.", param="name")
        return Project(**row._mapping)

    def projects(self) -> Sequence[Project]:
        rows = self._connection.execute(select(projects).order_by(projects.c.created_at, projects.c.id))
        return [Project(**row._mapping) for row in rows]

    def add_key(self, key: ApiKey) -> None:
        values = {name: getattr(key, name) for name in ("id", "project_id", "name", "prefix", "digest", "created_at")}
        self._connection.execute(insert(api_keys).values(**values, scopes=list(key.scopes)))

    def keys(self, project_id: str | None = None) -> Sequence[ApiKey]:
        query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        if project_id is not None:
            query = query.where(api_keys.c.project_id == project_id)
        return [_key(row) for row in self._connection.execute(query)]

    def keys_with_prefix(self, prefix: str) -> Sequence[ApiKey]:
        query = select(api_keys).where(api_keys.c.prefix == prefix, api_keys.c.revoked_at.is_(None))
        return [_key(row) for row in self._connection.execute(query)]

    def touch_key(self, key_id: str) -> None:
        stale = func.coalesce(api_keys.c.last_used_at < func.now() - TOUCH_EVERY, True)
        self._connection.execute(update(api_keys).where(api_keys.c.id == key_id, stale).values(last_used_at=func.now()))

    def revoke_key(self, key_id: str) -> bool:
        live = update(api_keys).where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
        return self._connection.execute(live.values(revoked_at=func.now())).rowcount > 0


def _key(row: object) -> ApiKey:
    values = dict(row._mapping)  # type: ignore[attr-defined]  # a SQLAlchemy Row
    return ApiKey(**{**values, "scopes": tuple(values["scopes"]), "digest": bytes(values["digest"])})
