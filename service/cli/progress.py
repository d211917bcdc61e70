"""Bars with rate and time left: of a batch, with its acceptance length, until it ends, and of whatever else is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from service.cli.client import Unreachable
from service.cli.output import console, note, print_json

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from service.cli.client import Server
    from service.cli.local_run import Tally

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
POLL_SECONDS = 0.5
OUTAGE_SECONDS = 120.0
"""A server that restarts must not end a `watch`; one that is gone this long does."""
SAID_EVERY = 10.0
"""Seconds between lines about progress where there is no terminal for a bar."""


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


def count_columns() -> tuple[ProgressColumn, ...]:
    """What is counted, a bar, how many of how many, and for how long."""
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

    return SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn()


@contextmanager
def counting() -> Iterator[Callable[[str, int, int], None]]:
    """Yields `tick(what, done, of)`: a bar on stderr for each `what`, with rate and ETA; where nobody watches, a line now and then."""
    from rich.progress import Progress, TextColumn

    with Progress(*count_columns(), TextColumn("{task.fields[figures]}"), console=console(stderr=True)) as progress:
        yield _Counts(progress).tick


class _Counts:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._watched = progress.console.is_terminal
        self._what = ""
        self._first = self._done = 0
        self._began = self._said = 0.0

    def tick(self, what: str, done: int, of: int) -> None:
        now = time.monotonic()
        if what != self._what or done < self._done:
            self._what, self._first, self._began, self._said = what, done, now, now
            self._task = self._progress.add_task(what, total=of, figures="", visible=self._watched)
        self._done = done
        figures = _pace(done - self._first, of - done, now - self._began)
        self._progress.update(self._task, completed=done, total=of, figures=figures)
        if not self._watched and (done == of or now - self._said >= SAID_EVERY):
            self._said = now
            note(f"{what}: {done} of {of}{figures and ', '}{figures}")


def _pace(done: int, left: int, seconds: float) -> str:
    """`3.1/s · ETA 0:12` or `4.2 s each · ETA 12:00`; nothing where nothing is done yet, and no ETA where nothing is left."""
    if not done or not seconds:
        return ""
    each = seconds / done
    rate = f"{1 / each:.1f}/s" if each < 1 else f"{each:.1f} s each"
    return rate if not left else f"{rate} · {_eta(each * left)}"


def _eta(seconds: float) -> str:
    return f"ETA {int(seconds) // 60}:{int(seconds) % 60:02d}"


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
        parts.append(_eta(eta_seconds))
    if failed:
        parts.append(f"{failed} failed")
    return " · ".join(parts)
