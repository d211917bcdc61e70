"""What commands print: JSON on stdout where asked for, tables otherwise, notes and errors on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

from service.errors import LongdraftError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
"""The `--json` flag that every command takes."""


PIPED_WIDTH = 200
"""Columns of a table that nobody reads on a screen: wide enough that ids stay in one piece."""


class Failure(LongdraftError):
    """A command cannot go on; the message says what, with which value, and what to do."""

    code, status = "command_failed", 400


def console(*, stderr: bool = False) -> Console:
    """A fresh console. rich is imported here: `--help` and `--json` do not need it."""
    from rich.console import Console

    found = Console(stderr=stderr, highlight=False)
    if not found.is_terminal:
        found.width = PIPED_WIDTH
    return found


def note(text: str) -> None:
    """A line for people, on stderr, so that stdout stays what was asked for."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """`value` on one line; dates and paths become strings."""
    import orjson

    print(orjson.dumps(value, default=str).decode(), flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None, right: Sequence[str] = ()) -> None:
    """A table of strings; the columns named in `right` are aligned right."""
    from rich.table import Table
    from rich.text import Text

    out = console()
    if title is not None:
        out.print(Text(title, style="bold"))
    table = Table(header_style="dim", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    out.print(table)
