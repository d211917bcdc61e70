"""Cost reports for people and spreadsheets: tables, CSV, charts."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from service.billing.operator import CostLine
from service.billing.price_book import rounded_dollars
from service.billing.tables import formula_safe
from service.cli.output import console, print_table

TERMINAL = "terminal"
SHOWN = (
    "lines",
    "input_tokens",
    "output_tokens",
    "price",
    "cost",
    "margin",
    "cost_per_million",
    "device_seconds",
    "saved_seconds_estimate",
)
"""Columns of a table besides the groups; CSV and JSON have all."""
TEXTS = ("worker", "device")
"""Columns that are no numbers, besides the groups."""
BAR = 40


def show(rows: Sequence[Mapping[str, Any]], totals: Sequence[Mapping[str, Any]], by: Sequence[str]) -> None:
    """A table; money to nine decimals, dashes where a device has no hourly rate."""
    if not rows:
        print("Nothing was delivered in this time.")
        return
    columns = [*by, *SHOWN] if by else list(rows[0])
    texts = {*by, *TEXTS}
    cells = [[_cell(row.get(column), text=column in texts) for column in columns] for row in rows]
    cells += [["total", *(_cell(row.get(column), text=column in texts) for column in columns[1:])] for row in totals]
    print_table(columns, cells, right=[column for column in columns if column not in texts])


def show_starts(rows: Sequence[Mapping[str, Any]]) -> None:
    """Loads of models under the table of workers: seconds from submission to first result, split; refusals with their reason."""
    if not rows:
        return
    answered = [row for row in rows if row["total_seconds"] is not None]
    if answered:
        names = [name for name in answered[0] if name not in ("batch", "error")]
        print("\nFrom submission to the first result, seconds:")
        cells = [[_cell(row[name], text=not name.endswith("_seconds")) for name in names] for row in answered]
        times = [name.removesuffix("_seconds") for name in names if name.endswith("_seconds")]
        print_table([name.removesuffix("_seconds") for name in names], cells, right=times)
    for row in rows:
        if row["error"]:
            print(f"\n{row['worker']} could not load {row['model']}: {row['error']}")


def write_csv(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> None:
    """To stdout. Texts that a spreadsheet would run as formulas are defused; numbers, also negative ones, are left as they are."""
    out = csv.writer(sys.stdout, lineterminator="\n")
    texts = {*by, *TEXTS}
    if rows:
        out.writerow([formula_safe(column) for column in rows[0]])
    for row in rows:
        out.writerow([formula_safe(str(value)) if column in texts else value for column, value in row.items()])


def plot(lines: Sequence[CostLine], by: Sequence[str], target: str) -> None:
    """Price and cost of each group as bars: into a file by matplotlib, or as text."""
    labels = [" / ".join(part or "-" for part in line.key) or "all" for line in lines]
    if target == TERMINAL:
        _text_bars(labels, lines)
        return
    from service.adapters.charts import bar_chart

    prices = [line.price / 1e15 for line in lines]
    costs = [None if line.cost is None else float(line.cost / 10**15) for line in lines]
    bar_chart(
        [label.replace(" / ", "\n") for label in labels],
        {"price (charged)": prices, "cost (device time)": costs},
        title=f"Price and cost by {', '.join(by)}",
        path=target,
    )


def _text_bars(labels: Sequence[str], lines: Sequence[CostLine]) -> None:
    largest = max((max(line.price, line.cost or 0) for line in lines), default=0) or 1
    width = max(map(len, labels), default=0)
    out = console()
    for label, line in zip(labels, lines, strict=True):
        for name, amount in (("price", line.price), ("cost", line.cost)):
            if amount is not None:
                bar = "█" * round(BAR * max(amount, 0) / largest)
                shown = label if name == "price" else ""
                out.print(f"{shown:<{width}}  {name:<5}  {bar:<{BAR}}  ${rounded_dollars(round(amount), 9)}", markup=False)


def _cell(value: Any, *, text: bool) -> str:
    if value is None or value == "":
        return "-"
    if text:
        return str(value)
    return f"{Decimal(value):.9f}" if isinstance(value, str) else f"{value:,}"
