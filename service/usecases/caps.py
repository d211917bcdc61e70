"""The gate of batches with a cap: a line may run once the most that it can cost is reserved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from service.billing.spending import prompt_bound, worst_case
from service.domain.line import GroupLease, LineOutcome, LineWork, Outcome
from service.domain.money import PriceBook, Reservation, Reserved
from service.domain.request_body import LineRejected, parse_body
from service.ports import UnitOfWork
from service.usecases.deliver import left_out


@dataclass(slots=True)
class CapGate:
    """`context`: how many tokens the loaded model's prompt and answer may have together: the length of an answer without a limit."""

    context: Callable[[], int]
    _prices: dict[int, PriceBook] = field(default_factory=dict)

    def reserve(self, uow: UnitOfWork, works: Sequence[tuple[LineWork, GroupLease]]) -> Reserved:
        """Which lines (of one batch) may run, have to wait, or can not run any more."""
        wanted = [Reservation(work.line_no, lease.group_id, lease.token, self._amount(uow, work, lease)) for work, lease in works]
        return uow.spending.reserve(works[0][0].batch_id, wanted)

    def verdicts(
        self, uow: UnitOfWork, works: Sequence[tuple[LineWork, GroupLease]]
    ) -> tuple[list[LineWork], list[LineWork], list[LineWork]]:
        """(may run, wait, left out); lines of batches without a cap may run."""
        run: list[LineWork] = [work for work, lease in works if not lease.capped]
        wait: list[LineWork] = []
        out: list[LineWork] = []
        capped = sorted((pair for pair in works if pair[1].capped), key=lambda pair: pair[0].key)
        for _, lines in groupby(capped, key=lambda pair: pair[0].batch_id):
            chosen = list(lines)
            answer = self.reserve(uow, chosen)
            run += [work for work, _ in chosen if work.line_no in answer.granted]
            wait += [work for work, _ in chosen if work.line_no in answer.waiting]
            out += [work for work, _ in chosen if work.line_no in answer.refused]
        return run, wait, out

    def _amount(self, uow: UnitOfWork, work: LineWork, lease: GroupLease) -> int:
        """Femto-dollars; 0 for a line that the endpoint will refuse, since that is never billed."""
        try:
            request = parse_body(work.endpoint, work.body)
        except LineRejected:
            return 0
        book = self._prices.get(lease.price_version)
        if book is None:
            book = self._prices[lease.price_version] = uow.ledger.price_book(lease.price_version)
        answer = request.max_tokens if request.max_tokens is not None else self.context()
        return worst_case(prompt_bound(request), answer * request.choices, book.rates(lease.model))


def never_run(work: LineWork) -> LineOutcome:
    """The outcome of a line that found no room under the cap."""
    return left_out(LineOutcome(work.batch_id, work.line_no, work.group_id, work.custom_id, Outcome.FAILED))
