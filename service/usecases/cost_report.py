"""Price and cost side by side, for the operator: over a stretch of time, grouped as asked for. Reads only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from fractions import Fraction

from service.billing.operator import CostLine, HourlyRates, WorkerLine
from service.billing.starts import StartSplit, StartTimes, split
from service.domain.money import Meter
from service.domain.usage import Work
from service.ports import ChargeFilter, ChargeRow, Database, LoadRow, WorkerRow, WorkRow
from service.usecases.keys import find_project


def cost_report(
    database: Database, *, start: datetime, end: datetime, by: Sequence[str], rates: HourlyRates, project: str | None = None
) -> Sequence[CostLine]:
    """Charges and the device time of delivered lines, by group, in the order of the groups. `project`: id or name; None takes all.

    Raises:
        InvalidRequest: a name that cannot be grouped by.
        NotFound: no such project.
    """
    with database.begin() as uow:
        project_id = find_project(uow, project).id if project else None
        charges = {row.key: row for row in uow.ledger.report(project_id=project_id, start=start, end=end, by=by)}
        work = uow.costs.work(ChargeFilter(start, end, [project_id] if project_id else None), by=by)
    return _merged(charges, work, rates)


def worker_report(database: Database, start: datetime, end: datetime, rates: HourlyRates) -> Sequence[WorkerLine]:
    """Workers that lived at some time between, over their whole lives."""
    with database.begin() as uow:
        rows = uow.costs.workers(start, end)
        if not rows:
            return []
        whole_lives = ChargeFilter(min(row.started_at for row in rows), uow.now + timedelta(seconds=1))
        attributed: dict[str, int] = {}
        for found in uow.costs.work(whole_lives, by=()):
            attributed[found.worker] = attributed.get(found.worker, 0) + found.work.device_ns
    return [_worker_line(row, attributed.get(row.id, 0), rates) for row in rows]


def _merged(charges: Mapping[tuple[str, ...], ChargeRow], work: Sequence[WorkRow], rates: HourlyRates) -> list[CostLine]:
    works: dict[tuple[str, ...], Work] = {}
    costs: dict[tuple[str, ...], Fraction | None] = {}
    for row in work:
        works[row.key] = works.get(row.key, Work()) + row.work
        cost = rates.cost(row.device, row.work.device_ns) if row.work.device_ns else Fraction(0)
        before = costs.get(row.key, Fraction(0))
        costs[row.key] = None if cost is None or before is None else before + cost
    return [_line(key, charges.get(key), works.get(key, Work()), costs.get(key, Fraction(0))) for key in sorted({*charges, *works})]


def _line(key: tuple[str, ...], charged: ChargeRow | None, work: Work, cost: Fraction | None) -> CostLine:
    charged = charged or ChargeRow(key, {}, {}, 0)
    tokens = {meter: charged.quantities.get(meter.value, 0) for meter in Meter}
    cached = tokens[Meter.CACHED_INPUT]
    return CostLine(key, charged.lines, tokens[Meter.INPUT] + cached, cached, tokens[Meter.OUTPUT], charged.total, cost, work)


def _worker_line(row: WorkerRow, attributed_ns: int, rates: HourlyRates) -> WorkerLine:
    wall_ns = ((row.stopped_at or row.seen_at) - row.started_at) // timedelta(microseconds=1) * 1000
    return WorkerLine(
        row.id, row.device, wall_ns, row.busy_ns, attributed_ns, row.load_ns, row.profile_ns, row.idle_ns, rates.cost(row.device, wall_ns)
    )


def load_report(database: Database, start: datetime, end: datetime) -> Sequence[tuple[LoadRow, StartSplit | None]]:
    """Loads of models in that time, oldest first; split where a job waited for it and got its first results."""
    with database.begin() as uow:
        rows = uow.loads.between(start, end)
    return [(row, split(times) if (times := _times(row)) is not None else None) for row in rows]


def _times(row: LoadRow) -> StartTimes | None:
    if row.submitted_at is None or row.due_at is None or row.first_result_at is None:
        return None
    load = row.load
    return StartTimes(
        row.submitted_at,
        row.due_at,
        load.claimed_at,
        row.first_result_at,
        load.spawn_ns,
        load.load_ns,
        load.profile_ns,
        row.prefill_ns,
        row.decode_ns,
    )
