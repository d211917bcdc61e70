"""Delivering outcomes: a segment a batch into the object store, then everything about them in one transaction.

A line is delivered when this transaction commits, and only then: its result, its token ledger and its charge appear together, under the
row locks of groups whose tokens still match. Both steps may be repeated: segments that no row names are garbage, and a line that already
has a result is left alone, so an answer that was lost on the way (was it committed?) is settled by doing it again.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import structlog

from service.billing.ledger import charge, debited
from service.billing.spending import CAP_REACHED
from service.domain.job import Batch, BatchStatus
from service.domain.line import GroupLease, LineOutcome, Outcome, Segment
from service.domain.money import LedgerTransaction, PriceBook
from service.domain.result_lines import pack_results
from service.domain.usage import Usage
from service.ports import BlobStore, Database, OutboxKind, UnitOfWork

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PackedSegment:
    """A stored object and the outcomes in it: (outcome, offset, length)."""

    segment: Segment
    placed: Sequence[tuple[LineOutcome, int, int]]


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a commit did: outcomes that were new, groups that are finished, groups that someone else owns by now."""

    new: Sequence[LineOutcome]
    closed: frozenset[int]
    lost: frozenset[int]

    @property
    def delivered(self) -> int:
        return len(self.new)


@dataclass(slots=True)
class Deliverer:
    """Writes segments and commits them. Remembers price books, which never change."""

    database: Database
    blobs: BlobStore
    worker_id: str
    _prices: dict[int, PriceBook] = field(default_factory=dict)

    def store(self, outcomes: Sequence[LineOutcome], leases: Mapping[int, GroupLease]) -> list[PackedSegment]:
        """Puts one object a batch. Raises Unavailable."""
        packed = []
        ordered = sorted(outcomes, key=lambda outcome: outcome.key)
        for batch_id, group in groupby(ordered, key=lambda outcome: outcome.batch_id):
            lines = list(group)
            data, placed = pack_results(lines)
            token = max((lease.token for line in lines if (lease := leases.get(line.group_id or 0))), default=0)
            info = self.blobs.put(f"segments/{batch_id}/{token}-{uuid.uuid4().hex}.jsonl", data)
            packed.append(PackedSegment(Segment(info.key, batch_id, len(data), hashlib.sha256(data).hexdigest(), self.worker_id), placed))
        return packed

    def commit(self, packed: Sequence[PackedSegment], leases: Mapping[int, GroupLease], *, also: Collection[int] = ()) -> Delivery:
        """One transaction. `also`: groups without outcomes that may be finished.

        A line whose charge would pass its batch's cap after all (reservations rest on a bound of the prompt's tokens) is delivered as
        left out, unbilled; its segment is written anew for that.

        Raises:
            Unavailable: it may or may not have been committed; calling again settles that.
        """
        while True:
            try:
                return self._commit(packed, leases, also)
            except _CapWouldPass as over:
                log.warning("max_cost_reached_at_commit", lines=len(over.keys))
                outcomes = [outcome for part in packed for outcome, _, _ in part.placed]
                packed = self.store([left_out(outcome) if outcome.key in over.keys else outcome for outcome in outcomes], leases)

    def _commit(self, packed: Sequence[PackedSegment], leases: Mapping[int, GroupLease], also: Collection[int]) -> Delivery:
        touched = {outcome.group_id for part in packed for outcome, _, _ in part.placed if outcome.group_id is not None} | set(also)
        asked = {group_id: leases[group_id].token for group_id in touched if group_id in leases}
        with self.database.begin() as uow:
            held = uow.groups.lock_held(asked)
            batch_ids = sorted({leases[group_id].batch_id for group_id in held})
            batches = {batch_id: uow.batches.load(batch_id, lock=True) for batch_id in batch_ids}
            new = [outcome for part in packed for outcome in self._add(uow, part, leases, held)]
            closed = uow.groups.close_finished(held)
            for batch in batches.values():
                finish_if_done(uow, batch)
        return Delivery(new, frozenset(closed), frozenset(touched - held))

    def _add(self, uow: UnitOfWork, part: PackedSegment, leases: Mapping[int, GroupLease], held: Collection[int]) -> Sequence[LineOutcome]:
        """The part of a segment that is still wanted: rows, counters and charges. Returns the outcomes that are new."""
        batch_id = part.segment.batch_id
        ours = [place for place in part.placed if place[0].group_id in held]
        known = uow.results.existing(batch_id, [outcome.line_no for outcome, _, _ in ours])
        new = [place for place in ours if place[0].line_no not in known]
        if not new:
            return ()
        outcomes = [outcome for outcome, _, _ in new]
        billed = [outcome for outcome in outcomes if outcome.outcome is Outcome.SUCCEEDED]
        usage = sum((outcome.usage for outcome in billed), Usage())
        commit_no = uow.batches.count(batch_id, completed=len(billed), failed=len(outcomes) - len(billed), usage=usage)
        added = uow.results.add(part.segment, new, commit_no)
        assert len(added) == len(new), f"{batch_id}: results appeared under a lock that should have kept them out"
        charges = [self._charge(uow, outcome, leases) for outcome in billed]
        uow.ledger.post(charges)
        if any(leases[outcome.group_id].capped for outcome in outcomes if outcome.group_id is not None):
            _settle(uow, batch_id, outcomes, charges)
        return outcomes

    def _charge(self, uow: UnitOfWork, outcome: LineOutcome, leases: Mapping[int, GroupLease]) -> LedgerTransaction:
        assert outcome.group_id is not None
        lease = leases[outcome.group_id]
        book = self._prices.get(lease.price_version)
        if book is None:
            book = self._prices[lease.price_version] = uow.ledger.price_book(lease.price_version)
        return charge(
            outcome,
            project_id=lease.project_id,
            model=lease.model,
            rates=book.rates(lease.model),
            price_version=lease.price_version,
        )


class _CapWouldPass(Exception):
    """Rolls the commit back: with these lines the batch would cost more than its cap."""

    def __init__(self, keys: frozenset[tuple[str, int]]) -> None:
        super().__init__(f"{len(keys)} lines")
        self.keys = keys


def _settle(uow: UnitOfWork, batch_id: str, outcomes: Sequence[LineOutcome], charges: Sequence[LedgerTransaction]) -> None:
    """Turns reservations into charges. Raises _CapWouldPass with the lines that do not fit."""
    room = uow.spending.room(batch_id)
    charged, over = 0, set()
    for transaction in charges:
        amount = debited(transaction)
        if room is not None and charged + amount > room:
            over.add((batch_id, transaction.line_no))
        else:
            charged += amount
    if over:
        raise _CapWouldPass(frozenset(over))
    uow.spending.settle(batch_id, [outcome.line_no for outcome in outcomes], charged)


def left_out(outcome: LineOutcome) -> LineOutcome:
    """The outcome of a line that is not delivered so that its batch stays under its cap."""
    return replace(
        outcome,
        outcome=Outcome.FAILED,
        status_code=None,
        body=None,
        error_code=CAP_REACHED,
        error_message="The batch's max_cost leaves no room for this line; it is not billed.",
        usage=Usage(),
    )


def finish_if_done(uow: UnitOfWork, batch: Batch) -> bool:
    """Moves a running batch (row locked by the caller) to finalizing once none of its groups is open."""
    if batch.status is not BatchStatus.IN_PROGRESS or uow.watch.open_in(batch.id):
        return False
    uow.batches.save(batch.to(BatchStatus.FINALIZING, uow.now, outcome=BatchStatus.COMPLETED))
    uow.outbox.add(OutboxKind.FINALIZE, batch_id=batch.id)
    log.info("batch_finalizing", batch_id=batch.id)
    return True
