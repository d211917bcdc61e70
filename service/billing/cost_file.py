"""`cost.json`: the bill of a batch, beside its output in the user's bucket. Whole numbers and strings only; equal to the ledger. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from service.billing.price_book import exact_dollars
from service.domain.job import Batch
from service.domain.money import FEMTO_PER_NANO, ChargeDetail, LedgerKind, PriceBook, Rates
from service.domain.usage import Work


def cost_file(batch: Batch, book: PriceBook, details: Iterable[ChargeDetail], lines: int, work: Work) -> Mapping[str, Any]:
    """Amounts in femto-dollars (tokens x rate, exact), rates in nano-dollars per million tokens, as the batch's price book has them.

    `charged` is what the delivered lines cost, `reversed` what was taken back of it, `amount` the difference: what is owed.
    """
    charged: dict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0])
    reversed_amount = 0
    for detail in details:
        if detail.kind is LedgerKind.REVERSAL:
            reversed_amount -= detail.amount
            continue
        sums = charged[detail.model, detail.meter.value, detail.rate]
        sums[0] += detail.quantity
        sums[1] += detail.amount
    total = sum(amount for _, amount in charged.values())
    models = sorted({model for model, _, _ in charged})
    return {
        "object": "batch.cost_file",
        "batch_id": batch.id,
        "project_id": batch.project_id,
        "currency": "usd",
        "amount": exact_dollars(total - reversed_amount),
        "amount_femto_dollars": total - reversed_amount,
        "amount_nano_dollars": exact_nano_dollars(total - reversed_amount),
        "charged_femto_dollars": total,
        "reversed_femto_dollars": reversed_amount,
        "billed_lines": lines,
        "price_version": batch.price_version,
        "prices_nano_dollars_per_million_tokens": {model: _rates(book.rates(model)) for model in models},
        "meters": [
            {"model": model, "meter": meter, "tokens": tokens, "nano_dollars_per_million_tokens": rate, "amount_femto_dollars": amount}
            for (model, meter, rate), (tokens, amount) in sorted(charged.items())
        ],
        "tokens": {
            name: getattr(work, name)
            for name in ("prompt", "cached", "prefilled", "generated", "drafted", "verified", "accepted", "recomputed", "sampled")
        },
        "device_nanoseconds": {"prefill": work.prefill_ns, "draft": work.draft_ns, "decode": work.decode_ns, "total": work.device_ns},
    }


def exact_nano_dollars(femto: int) -> str:
    """All digits, as a decimal string: 1_500_000 femto-dollars are '1.5' nano-dollars."""
    sign = "-" if femto < 0 else ""
    whole, part = divmod(abs(femto), FEMTO_PER_NANO)
    digits = f"{part:06d}".rstrip("0")
    return f"{sign}{whole}.{digits}" if digits else f"{sign}{whole}"


def _rates(rates: Rates) -> dict[str, int]:
    return {"input": rates.input, "cached_input": rates.cached_input, "output": rates.output}
