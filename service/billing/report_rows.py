"""Operator reports as rows of text and numbers: the columns that tables, CSV and JSON share. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from service.billing.operator import CostLine, WorkerLine
from service.billing.price_book import exact_dollars
from service.billing.reports import model_error, saved_ns, wasted
from service.billing.starts import StartSplit

NANO = 10**9


def cost_row(line: CostLine, by: Sequence[str]) -> dict[str, Any]:
    """One group. Prices are exact decimal dollars; what device time cost is rounded half-even to the last digit of a femto-dollar."""
    work = line.work
    return {
        **dict(zip(by, line.key, strict=False)),
        "lines": line.lines,
        "input_tokens": line.input_tokens,
        "cached_tokens": line.cached_tokens,
        "output_tokens": line.output_tokens,
        "price": exact_dollars(line.price),
        "cost": _dollars(line.cost),
        "margin": _dollars(line.margin),
        "price_per_million": _dollars(line.per_million(line.price)),
        "cost_per_million": _dollars(line.per_million(line.cost)),
        "device_seconds": _seconds(work.device_ns),
        "prefill_seconds": _seconds(work.prefill_ns),
        "draft_seconds": _seconds(work.draft_ns),
        "decode_seconds": _seconds(work.decode_ns),
        "prompt": work.prompt,
        "generated": work.generated,
        "drafted": work.drafted,
        "verified": work.verified,
        "accepted": work.accepted,
        "wasted": wasted(work),
        "saved_seconds_estimate": _seconds(saved) if (saved := saved_ns(work)) is not None else None,
        "estimate_error": round(error, 4) if (error := model_error(work)) is not None else None,
    }


def worker_row(line: WorkerLine) -> dict[str, Any]:
    """One worker: wall = attributed + lost + load + profile + idle, but for what the clocks disagree on (`unaccounted`, a share)."""
    return {
        "worker": line.id,
        "device": line.device,
        "wall_seconds": _seconds(line.wall_ns),
        "attributed_seconds": _seconds(line.attributed_ns),
        "lost_seconds": _seconds(line.lost_ns),
        "load_seconds": _seconds(line.load_ns),
        "profile_seconds": _seconds(line.profile_ns),
        "idle_seconds": _seconds(line.idle_ns),
        "unaccounted": round(line.unaccounted, 6),
        "cost": _dollars(line.cost),
    }


PARTS = ("validate", "wait", "spawn", "load", "profile", "prefill", "decode", "other")


def start_row(worker: str, model: str, batch_id: str | None, reused: bool, error: str | None, parts: StartSplit | None) -> dict[str, Any]:
    """One load of a model: seconds from a job's submission to its first committed results, and their parts, which sum to it."""
    row = {"worker": worker, "model": model, "batch": batch_id, "profile_reused": reused, "error": error}
    seconds = {f"{name}_seconds": None if parts is None else _seconds(getattr(parts, name)) for name in ("total", *PARTS)}
    return {**row, **seconds}


def _dollars(femto: Fraction | None) -> str | None:
    return None if femto is None else exact_dollars(round(femto))


def _seconds(nanoseconds: int) -> float:
    return round(nanoseconds / NANO, 6)
