"""Loads of models by workers: where the time of a start went, and which models nobody could load."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta

from sqlalchemy import Connection, func, insert, select, update

from service.adapters.tables import batches, groups, model_loads, workers
from service.ports import LoadRow, ModelLoad, Refusals


class Loads:
    """ports.LoadStore on one transaction's connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def note(self, load: ModelLoad) -> int:
        values = {
            "worker_id": load.worker_id,
            "model": load.model,
            "batch_id": load.batch_id,
            "claimed_at": load.claimed_at,
            "spawn_ns": load.spawn_ns,
            "load_ns": load.load_ns,
            "profile_ns": load.profile_ns,
            "profile_reused": load.profile_reused,
            "error": load.error,
            "lasting": load.lasting,
        }
        return int(self._connection.execute(insert(model_loads).values(values).returning(model_loads.c.id)).scalar_one())

    def answered(self, load_id: int, *, prefill_ns: int, decode_ns: int) -> None:
        values = {"first_result_at": func.now(), "prefill_ns": prefill_ns, "decode_ns": decode_ns}
        self._connection.execute(update(model_loads).where(model_loads.c.id == load_id).values(values))

    def between(self, start: datetime, end: datetime) -> Sequence[LoadRow]:
        query = (
            select(model_loads, workers.c.device, batches.c.created_at.label("submitted_at"), batches.c.in_progress_at.label("due_at"))
            .join(workers, workers.c.id == model_loads.c.worker_id)
            .outerjoin(batches, batches.c.id == model_loads.c.batch_id)
            .where(model_loads.c.ended_at >= start, model_loads.c.ended_at < end)
            .order_by(model_loads.c.id)
        )
        found = []
        for row in self._connection.execute(query):
            values = dict(row._mapping)
            del values["id"]
            outer = {name: values.pop(name) for name in ("device", "submitted_at", "due_at", "ended_at", "first_result_at")}
            times = {name: values.pop(name) for name in ("prefill_ns", "decode_ns")}
            found.append(LoadRow(ModelLoad(**values), **outer, **times))
        return found

    def refusals(self, model: str, within: timedelta) -> Refusals:
        refused = model_loads.c.error.is_not(None)
        query = select(
            func.count().filter(refused),
            func.count().filter(refused, model_loads.c.lasting),
            func.count().filter(~refused),
        ).where(model_loads.c.model == model, model_loads.c.ended_at > func.now() - within)
        count, lasting, loaded = self._connection.execute(query).one()
        return Refusals(0, 0) if loaded else Refusals(count, lasting)

    def obstacles(self, batch_ids: Collection[str], within: timedelta) -> Mapping[str, Sequence[tuple[str, str]]]:
        errors = refused_models(self._connection, within)
        if not errors:
            return {}  # nearly always
        waiting = (
            select(groups.c.batch_id, groups.c.model)
            .where(groups.c.batch_id.in_(batch_ids), groups.c.model.in_(errors), groups.c.closed_at.is_(None))
            .distinct()
            .order_by(groups.c.batch_id, groups.c.model)
        )
        found: dict[str, list[tuple[str, str]]] = {}
        for row in self._connection.execute(waiting):
            found.setdefault(row.batch_id, []).append((row.model, errors[row.model]))
        return found


def refused_models(connection: Connection, within: timedelta) -> Mapping[str, str]:
    """Model -> error, of those whose newest load in that time was refused."""
    newest = select(func.max(model_loads.c.id)).where(model_loads.c.ended_at > func.now() - within).group_by(model_loads.c.model)
    rows = connection.execute(select(model_loads.c.model, model_loads.c.error).where(model_loads.c.id.in_(newest)))
    return {row.model: row.error for row in rows if row.error is not None}
