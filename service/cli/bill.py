"""Bills and cost reports as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from service.cli.output import console, print_json, print_table


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


def print_report(report: dict[str, Any]) -> None:
    """One batch in detail: what was charged, at which rate, and what speculation and prefix sharing did for it."""
    lines = report["lines"]
    state = "final" if report["final"] else "so far"
    print_table(
        ("meter", "model", "tokens", "$ per million", "charge"),
        [*(_meter(meter) for meter in report["meters"]), ("total", "", "", "", dollars(report["amount"]))],
        title=f"Bill of {report['batch_id']} ({state}; {lines['billed']} of {lines['total']} lines delivered and charged)",
        right=("tokens", "$ per million", "charge"),
    )
    console().print("\n".join(["", *_speculation(report["speculation"], report["device_seconds"])]))


def print_estimate(estimate: dict[str, Any]) -> None:
    """What a batch would cost: least, expected, most; what that rests on; and why it would fail, if it would."""
    columns = ("model", "lines", "prompt tokens", "least", "expected", "most")
    rows = [
        (row["model"], row["lines"], row["prompt_tokens"], *(dollars(row["amount"][name]) for name in ("min", "expected", "max")))
        for row in estimate["models"]
    ]
    rows.append(("total", estimate["lines"], "", *(dollars(estimate["amount"][name]) for name in ("min", "expected", "max"))))
    print_table(columns, rows, right=columns[1:])
    for row in estimate["models"]:
        print(f"{row['model']}: {row['assumptions']}.")
    for error in estimate["errors"]["data"][:10]:
        where = f"line {error['line']}: " if error["line"] else ""
        print(f"It would fail: {where}{error['code']}: {error['message']}")


def _meter(meter: dict[str, Any]) -> tuple[str, ...]:
    name = meter["meter"].replace("_", " ")
    return name, meter["model"], f"{meter['quantity']:,}", meter["dollars_per_million"], dollars(meter["amount"])


def _speculation(speculation: dict[str, Any], device: dict[str, float]) -> list[str]:
    """Sentences; a batch in which nothing was drafted says so."""
    seconds = (
        f"Device time {device['total']:.1f} s: prefill {device['prefill']:.1f}, draft {device['draft']:.1f}, decode {device['decode']:.1f}"
    )
    if not speculation["drafted"]:
        return ["Speculation: nothing was drafted, plain decoding paid better", seconds]
    share = f" ({speculation['acceptance_rate']:.0%} of the verified)" if speculation["acceptance_rate"] is not None else ""
    length = speculation["acceptance_length"]
    return [
        f"Speculation: {speculation['drafted']:,} tokens drafted, {speculation['verified']:,} verified, "
        f"{speculation['accepted']:,} accepted{share}, {speculation['pruned']:,} not worth verifying",
        f"Acceptance length {length:.2f}: the target model ran {1 - 1 / length:.0%} fewer steps than plain decoding would have"
        if length
        else "No line has been decoded yet",
        *_saved(speculation),
        seconds,
    ]


def _saved(speculation: dict[str, Any]) -> list[str]:
    saved, error = speculation["saved_seconds_estimate"], speculation["estimate_error"]
    if saved is None or error is None:
        return []
    verb = "saved" if saved >= 0 else "lost"
    return [f"It {verb} about {abs(saved):.1f} s of device time (estimate; the cost model is {abs(error):.0%} off where it was measured)"]
