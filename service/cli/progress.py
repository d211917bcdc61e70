"""Watching a batch: one bar with lines, rate, acceptance length and time left, until the batch ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

from service.cli.client import Unreachable
from service.cli.output import console, print_json

if TYPE_CHECKING:
    from rich.progress import Progress

    from service.cli.client import Server
    from service.cli.local_run import Tally

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
POLL_SECONDS = 0.5
OUTAGE_SECONDS = 120.0
"""A server that restarts must not end a `watch`; one that is gone this long does."""


def states(server: Server, batch_id: str, *, sleep: Callable[[float], None] = time.sleep) -> Iterator[dict[str, Any]]:
    """The batch object, twice a second, ending with its final state. Raises Unreachable after two minutes without an answer."""
    answered = time.monotonic()
    while True:
        try:
            batch = server.get(f"/batches/{batch_id}")
        except Unreachable:
            if time.monotonic() - answered > OUTAGE_SECONDS:
                raise
        else:
            answered = time.monotonic()
            yield batch
            if batch["status"] in ENDED:
                return
        sleep(POLL_SECONDS)


def watch(server: Server, batch_id: str, *, as_json: bool) -> dict[str, Any]:
    """Shows the batch until it ends and returns its final object. With `as_json`: one JSON line whenever something changed."""
    return _watch_json(server, batch_id) if as_json else _watch_bar(server, batch_id)


def _watch_json(server: Server, batch_id: str) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for batch in states(server, batch_id):
        if batch != shown:
            print_json(batch)
        shown = batch
    return shown


def _watch_bar(server: Server, batch_id: str) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    with line_progress() as progress:
        task = progress.add_task("waiting", total=None, figures="")
        for batch in states(server, batch_id):
            counts = batch["request_counts"]
            progress.update(
                task,
                description=batch["status"],
                total=counts["total"] or None,
                completed=counts["completed"] + counts["failed"],
                figures=figures(batch),
            )
    return batch


class RunBar:
    """The bar of a job that runs in this process; with `quiet` it shows nothing."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._progress = line_progress()
        self._progress.disable = quiet
        self._total = total
        self._task = self._progress.add_task("loading", total=total, figures="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def update(self, tally: Tally) -> None:
        done = tally.completed + tally.failed
        eta = tally.seconds * (self._total - done) / done if tally.seconds else None
        figures = speed(tally.tokens_per_second, tally.acceptance_length, eta, tally.failed)
        self._progress.update(self._task, description="running", completed=done, figures=figures)


def line_progress() -> Progress:
    """A bar over lines, on stderr. Tasks carry a `figures` field: rates, already put into words."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<11}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("lines"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console(stderr=True),
    )


def figures(batch: dict[str, Any]) -> str:
    """Rate, acceptance length, ETA and failures of a batch object, where known."""
    progress = batch.get("progress") or {}
    counts = batch["request_counts"]
    return speed(progress.get("tokens_per_second"), progress.get("acceptance_length"), progress.get("eta_seconds"), counts["failed"])


def speed(tokens_per_second: float | None, acceptance_length: float | None, eta_seconds: float | None, failed: int) -> str:
    """`180 tok/s · 1.42 tokens a step · ETA 0:12 · 1 failed`, leaving out what is not known."""
    parts = []
    if tokens_per_second:
        parts.append(f"{tokens_per_second:.0f} tok/s")
    if acceptance_length:
        parts.append(f"acceptance length {acceptance_length:.2f}")
    if eta_seconds is not None:
        parts.append(f"ETA {int(eta_seconds) // 60}:{int(eta_seconds) % 60:02d}")
    if failed:
        parts.append(f"{failed} failed")
    return " · ".join(parts)
