"""Timing, ceilings and tables of the kernel and engine benchmarks; on a CPU everything runs in the interpreter or eagerly, at tiny size."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


CALLS = 10
"""At least so many in a captured graph: its own launch, some microseconds, then weighs little."""
COLD_BYTES = 200 << 20
"""What calls on different inputs must read between two on the same, so that nothing is left of it in a cache (an H100's L2 has 50 MB)."""


def copies(nbytes: int, where: torch.device) -> int:
    """Sets of inputs that calls which move `nbytes` each must take in turn."""
    return 1 if where.type != "cuda" else min(-(-COLD_BYTES // max(nbytes, 1)), CALLS)


def seconds(calls: Sequence[Callable[[], object]], where: torch.device) -> float:
    """Median seconds of one call. On a GPU by events around a graph of the `calls` in turn (see `copies`), captured as the engine's steps
    are: what is timed is the device, not Python's launches.
    """
    for call in calls:
        call()
    if where.type == "cpu":
        times = []
        for call in (calls[0], calls[0]):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    import triton

    torch.cuda.synchronize(where)
    graph = torch.cuda.CUDAGraph()
    rounds = -(-CALLS // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    taken = float(triton.testing.do_bench(graph.replay, warmup=5, rep=40, return_mode="median")) * 1e-3
    return taken / (rounds * len(calls))


def ceilings(where: torch.device) -> dict[str, float]:
    """Bytes/s of a large copy (read plus written) and bfloat16 FLOP/s of a large matrix product, on this device, now."""
    size = 1 << (28 if where.type == "cuda" else 20)
    source = torch.randn(size // 4, device=where)
    target = torch.empty_like(source)
    side = 8192 if where.type == "cuda" else 128
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=where).to(dtype) for _ in range(2))
    return {
        "bytes_per_s": 2 * source.nbytes / seconds([lambda: target.copy_(source)], where),
        "flops_per_s": 2 * side**3 / seconds([lambda: torch.matmul(a, b)], where),
    }


def describe(where: torch.device) -> dict[str, str]:
    import transformers
    import triton

    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {platform.machine()} (figures say nothing of a GPU)"
    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    return {"device": name, **versions, "python": platform.python_version()}


def save(title: str, where: torch.device, rows: Sequence[dict[str, Any]], extra: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """The record of a run, or of as much of one as there is; written to `out`, which is at no time half a record."""
    record = {"benchmark": title, **describe(where), **extra, "rows": list(rows)}
    if out is not None:
        scratch = out.with_name(f"{out.name}.new")
        scratch.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        scratch.replace(out)
    return record


def report(
    title: str, where: torch.device, rows: Sequence[dict[str, Any]], extra: dict[str, Any], *, as_json: bool, out: Path | None
) -> None:
    """A table of `rows` on stdout, or one JSON object; `out` gets the JSON in any case."""
    record = save(title, where, rows, extra, out)
    if as_json:
        sys.stdout.write(json.dumps(record) + "\n")
        return
    sys.stdout.write(f"{title} on {record['device']}, torch {record['torch']}, triton {record['triton']}\n")
    for name, value in extra.items():
        sys.stdout.write(f"  {name}: {value}\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([_shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    for line in lines:
        sys.stdout.write(
            "  ".join(
                text.rjust(width) if index else text.ljust(width) for index, (text, width) in enumerate(zip(line, widths, strict=True))
            )
            + "\n"
        )


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


class Deadline:
    """`seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._started, self._seconds = time.monotonic(), seconds

    @property
    def passed(self) -> float:
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        return self._seconds - self.passed

    def check(self, needed: float = 0.0) -> None:
        """Raises TimeoutError where `needed` seconds are not left."""
        if self.left < needed:
            raise TimeoutError(f"{self._seconds:g} s are over; --models and --within say what runs and how long")


def whatever_happens(part: str, rows: Iterator[Row]) -> Iterator[Row]:
    """A part that fails is a row, and the next one is run; only time stops everything."""
    try:
        yield from rows
    except TimeoutError:
        raise
    except Exception as error:  # noqa: BLE001
        sys.stderr.write(traceback.format_exc())
        yield {"run": f"{part} failed", "note": f"{type(error).__name__}: {str(error)[:200]}"}


def empty(place: torch.device) -> None:
    """What is not used any more goes back to the device, where another process may need it."""
    import gc

    gc.collect()
    if place.type == "cuda":
        torch.cuda.empty_cache()
