"""Usage and costs by time bucket, in pages: what OpenAI's organization endpoints report. Straight from the ledger, net of reversals."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from service.errors import InvalidRequest
from service.ports import ChargeFilter, ChargeRow, Database

_PAGE = re.compile(r"page_([0-9]{1,11})")
_LATEST = 253_402_300_799
"""The last second of the year 9999: what a timestamp can say."""


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """What is asked for. Times in Unix seconds; buckets begin at multiples of `width`, and so does the first one.

    `limit`: buckets a page. `page`: where the page before said to go on. `project_ids` and the like: None for all of the caller's.
    """

    start: int
    end: int | None
    width: timedelta
    limit: int
    by: Sequence[str] = ()
    page: str | None = None
    project_ids: Collection[str] | None = None
    api_key_ids: Collection[str] | None = None
    models: Collection[str] | None = None


@dataclass(frozen=True, slots=True)
class UsageBucket:
    """[start, end) in Unix seconds, and the charges in it by group; a bucket without any is there, too."""

    start: int
    end: int
    rows: Sequence[ChargeRow]


@dataclass(frozen=True, slots=True)
class UsagePage:
    buckets: Sequence[UsageBucket]
    next_page: str | None


def usage_page(database: Database, project_id: str, query: UsageQuery) -> UsagePage:
    """One page for the caller's project; other projects' ids find nothing.

    Raises:
        InvalidRequest: times that make no sense, or a page that is not ours.
    """
    width = int(query.width.total_seconds())
    with database.begin() as uow:
        first, end = _bounds(query, int(uow.now.timestamp()), width)
        start = _page_start(query.page, first, end, width)
        stop = min(start + query.limit * width, -(-end // width) * width)
        projects = [project_id] if query.project_ids is None or project_id in query.project_ids else []
        which = ChargeFilter(_time(start), _time(min(stop, end)), projects, query.api_key_ids, models=query.models)
        found = uow.costs.buckets(which, width=query.width, by=query.by)
    rows: dict[int, list[ChargeRow]] = {}
    for bucket in found:
        rows.setdefault(int(bucket.start.timestamp()), []).append(bucket.charges)
    buckets = [UsageBucket(at, at + width, rows.get(at, ())) for at in range(start, stop, width)]
    return UsagePage(buckets, f"page_{stop}" if stop < end else None)


def _bounds(query: UsageQuery, now: int, width: int) -> tuple[int, int]:
    end = query.end if query.end is not None else now + 1
    if not 0 <= query.start <= _LATEST - width:
        raise InvalidRequest(f"'start_time' is a Unix time in seconds, got {query.start}.", param="start_time")
    if not query.start < end <= _LATEST:
        raise InvalidRequest(f"'end_time' must lie after 'start_time' ({query.start}), got {end}.", param="end_time")
    return query.start // width * width, end


def _page_start(page: str | None, first: int, end: int, width: int) -> int:
    if page is None:
        return first
    match = _PAGE.fullmatch(page)
    if match is None or not first <= int(match[1]) < end or int(match[1]) % width:
        raise InvalidRequest(f"'page' must be the 'next_page' of the answer before, got {page[:64]!r}.", param="page")
    return int(match[1])


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
