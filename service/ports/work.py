"""Stores of what is to be done: groups of lines for the workers, the outbox for the control process, and how much of both there is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any, Protocol

from service.domain.line import GroupLease, PlannedGroup


class GroupStore(Protocol):
    """Groups of lines: the unit of lease and recovery. Leases are judged by the database's clock."""

    def plan(self, batch_id: str, groups: Iterable[PlannedGroup]) -> int:
        """Creates the groups of a validated batch, due at once; returns how many."""
        ...

    def claim(self, worker_id: str, *, model: str | None, lease: timedelta, max_lines: int) -> Sequence[GroupLease]:
        """Takes due groups (highest priority, then soonest expiry, then oldest), raising their tokens; SKIP LOCKED.

        At least one group if any is due, further ones while they fit `max_lines`. A suspect group comes alone.
        `model=None` takes the model with the most due work.
        """
        ...

    def renew(self, leases: Mapping[int, int], lease: timedelta) -> set[int]:
        """Extends {group id: token}; returns the ids still held."""
        ...

    def lock_held(self, leases: Mapping[int, int]) -> set[int]:
        """Locks these groups FOR UPDATE in id order; returns the ids whose token still matches and that are open."""
        ...

    def close_finished(self, group_ids: Collection[int]) -> set[int]:
        """Closes those whose lines all have results (rows are locked by the caller); returns the ids closed."""
        ...

    def release(self, leases: Mapping[int, int], *, delay: timedelta = timedelta(0)) -> None:
        """Gives groups back, due again after `delay`. A token that no longer matches is left alone."""
        ...

    def close_batch(self, batch_id: str) -> int:
        """Locks and closes all open groups of a batch and raises their tokens, so that no worker can commit to them."""
        ...


class GroupWatch(Protocol):
    """The sweeper's and autoscaler's view of the groups."""

    def due(self) -> Mapping[str, int]:
        """Model -> groups claimable now."""
        ...

    def due_or_leased(self) -> Mapping[str, int]:
        """Model -> open groups of running batches: what the autoscaler scales on."""
        ...

    def open_in(self, batch_id: str) -> int: ...
    def take_back_dead(self, limit: int) -> Sequence[int]:
        """Ends leases that ran out: tokens raised, groups due again. Returns their ids."""
        ...

    def take_back_worker(self, worker_id: str) -> Sequence[int]:
        """The same for every lease of a worker known to be dead."""
        ...

    def isolate(self, group_ids: Collection[int], *, attempts: int) -> int:
        """Moves unfinished lines admitted at least `attempts` times into suspect groups of one line each; returns how many."""
        ...


class OutboxKind(StrEnum):
    VALIDATE = "validate"
    FINALIZE = "finalize"
    WAKE = "wake"
    """Tell workers of a model that groups are due (a hint: losing it costs latency only)."""


@dataclass(frozen=True, slots=True)
class OutboxItem:
    """Work promised in the transaction that made it due; leased and fenced like a group."""

    id: int
    kind: OutboxKind
    batch_id: str | None
    payload: Mapping[str, Any]
    token: int
    attempts: int


class Outbox(Protocol):
    """The control process's work list."""

    def add(self, kind: OutboxKind, *, batch_id: str | None = None, payload: Mapping[str, Any] | None = None) -> None:
        """At most one open item for (kind, batch_id, payload): a second add changes nothing."""
        ...

    def claim(self, owner: str, *, kinds: Collection[OutboxKind], lease: timedelta, limit: int) -> Sequence[OutboxItem]: ...
    def renew(self, item: OutboxItem, lease: timedelta) -> bool: ...
    def hold(self, item: OutboxItem) -> None:
        """Locks the row and compares the token: call it first in every transaction that acts for the item. Raises LeaseLost."""
        ...

    def done(self, item: OutboxItem) -> None: ...
    def retry(self, item: OutboxItem, *, error: str, delay: timedelta) -> None: ...
    def open_items(self) -> int: ...


@dataclass(frozen=True, slots=True)
class OutboxLag:
    """Open items of a kind, and by how many seconds the oldest is late."""

    open: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Backlog:
    """What there is to do. `groups`: (model, due | leased | waiting) -> how many; `batches`: status -> how many have not ended."""

    groups: Mapping[tuple[str, str], int]
    batches: Mapping[str, int]
    outbox: Mapping[OutboxKind, OutboxLag]
    workers: int
    refused: Collection[str]
    """Models whose last load was refused, today."""


class MonitorStore(Protocol):
    def backlog(self, live_within: timedelta) -> Backlog:
        """`live_within`: how recently a live worker must have been heard of."""
        ...
