"""Bills and cost reports as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from service.cli.output import print_json, print_table


def dollars(amount: str) -> str:
    """An exact decimal string as dollars, every digit kept: `$0.000012345`."""
    return f"-${amount[1:]}" if amount.startswith("-") else f"${amount}"


def print_summary(batches: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """What each of these batches cost, and their sum."""
    total = sum((Decimal(batch["cost"]["amount"]) for batch in batches), Decimal(0))
    if as_json:
        rows = [{"batch": batch["id"], "status": batch["status"], "cost": batch["cost"], "usage": batch["usage"]} for batch in batches]
        print_json({"batches": rows, "total": {"amount": f"{total:f}", "currency": "usd"}})
        return
    columns = ("batch", "status", "lines", "input tokens", "cached", "output tokens", "cost")
    rows_shown = [_row(batch) for batch in batches]
    rows_shown.append(("total", "", "", "", "", "", dollars(f"{total:f}")))
    print_table(columns, rows_shown, right=columns[2:])


def _row(batch: dict[str, Any]) -> tuple[Any, ...]:
    usage = batch["usage"]
    return (
        batch["id"],
        batch["status"],
        batch["request_counts"]["total"],
        usage["input_tokens"],
        usage["input_tokens_details"]["cached_tokens"],
        usage["output_tokens"],
        dollars(batch["cost"]["amount"]) + ("" if batch["cost"]["final"] else " so far"),
    )
