"""What a batch cost and what speculation did for it, shaped for the API and the command line. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from service.billing.price_book import exact_dollars, format_rate
from service.domain.job import Batch
from service.domain.money import ChargeDetail
from service.domain.usage import Work

NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class MeterCharge:
    """Tokens of one meter and model at one rate (nano-dollars per million tokens); `amount` in femto-dollars, reversals taken off."""

    model: str
    meter: str
    quantity: int
    rate: int
    amount: int


@dataclass(frozen=True, slots=True)
class BatchCost:
    """The bill of a batch and the work behind it. `lines`: charges net of reversals."""

    batch: Batch
    lines: int
    meters: Sequence[MeterCharge]
    work: Work

    @property
    def total(self) -> int:
        """Femto-dollars."""
        return sum(meter.amount for meter in self.meters)


def sum_up(batch: Batch, lines: int, details: Iterable[ChargeDetail], work: Work) -> BatchCost:
    """Sums the ledger's details of one batch by model, meter and rate."""
    quantities: dict[tuple[str, str, int], int] = defaultdict(int)
    amounts: dict[tuple[str, str, int], int] = defaultdict(int)
    for detail in details:
        key = detail.model, detail.meter.value, detail.rate
        quantities[key] += detail.quantity
        amounts[key] += detail.amount
    meters = [MeterCharge(*key[:2], quantities[key], key[2], amounts[key]) for key in sorted(amounts)]
    return BatchCost(batch, lines, meters, work)


def acceptance_length(work: Work) -> float | None:
    """Tokens that a target forward pass yields on average (tau); 1 is plain decoding. None where nothing was decoded."""
    return round(work.sampled / work.steps, 3) if work.steps else None


def cost_json(cost: BatchCost) -> dict[str, Any]:
    """The answer of `GET /v1/batches/{id}/cost`. Money is exact decimal dollars, as strings; everything else may be rounded."""
    batch = cost.batch
    return {
        "object": "batch.cost",
        "batch_id": batch.id,
        "status": batch.status.value,
        "model": batch.model,
        "currency": "usd",
        "amount": exact_dollars(cost.total),
        "final": batch.status.terminal,
        "price_version": batch.price_version,
        "lines": {"total": batch.total, "billed": cost.lines, "completed": batch.completed, "failed": batch.failed},
        "meters": [_meter_json(meter) for meter in cost.meters],
        "tokens": tokens_json(cost.work),
        "speculation": speculation_json(cost.work),
        "device_seconds": device_seconds_json(cost.work),
    }


def _meter_json(meter: MeterCharge) -> dict[str, Any]:
    return {
        "model": meter.model,
        "meter": meter.meter,
        "quantity": meter.quantity,
        "dollars_per_million": format_rate(meter.rate),
        "amount": exact_dollars(meter.amount),
    }


def speculation_json(work: Work) -> dict[str, Any]:
    """Drafted tokens end as pruned (never verified), accepted or rejected."""
    return {
        "drafted": work.drafted,
        "verified": work.verified,
        "accepted": work.accepted,
        "rejected": work.rejected,
        "pruned": work.pruned,
        "acceptance_length": acceptance_length(work),
        "acceptance_rate": round(work.accepted / work.verified, 4) if work.verified else None,
        "saved_seconds_estimate": _seconds(saved) if (saved := saved_ns(work)) is not None else None,
        "estimate_error": round(error, 4) if (error := model_error(work)) is not None else None,
    }


def saved_ns(work: Work) -> int | None:
    """Device time that speculation saved, estimated: plain decoding of the same tokens by the engine's cost model, less what drafting and
    decoding took. Negative where it lost; None without a cost model."""
    return work.plain_ns - work.decode_ns - work.draft_ns if work.plain_ns else None


def model_error(work: Work) -> float | None:
    """How far the cost model was off on the steps that were run: 0.05 means that it said 5% more than was measured."""
    return work.modelled_ns / work.decode_ns - 1 if work.modelled_ns and work.decode_ns else None


def wasted(work: Work) -> int:
    """Tokens computed for nothing: drafts thrown away, positions computed again, tokens behind a stop."""
    return work.drafted - work.accepted + work.recomputed + work.sampled - work.generated


def tokens_json(work: Work) -> dict[str, int]:
    """What the delivered lines made the machine do, in tokens (billed tokens are in the meters)."""
    return {
        "prompt": work.prompt,
        "cached": work.cached,
        "prefilled": work.prefilled,
        "generated": work.generated,
        "wasted": wasted(work),
    }


def device_seconds_json(work: Work) -> dict[str, float]:
    """Device time of the delivered lines by what it was spent on."""
    return {
        "prefill": _seconds(work.prefill_ns),
        "draft": _seconds(work.draft_ns),
        "decode": _seconds(work.decode_ns),
        "total": _seconds(work.device_ns),
    }


def _seconds(nanoseconds: int) -> float:
    return round(nanoseconds / NANOSECONDS, 6)
