"""Timing, ceilings and tables of the kernel and engine benchmarks; on a CPU everything runs in the interpreter or eagerly, at tiny size."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(call: Callable[[], object], where: torch.device, repeats: int = 20) -> float:
    """Median seconds of one call. On a GPU by events, after a warm-up, with the L2 cache overwritten before each; the call is captured in a
    graph first, as the engine's are, so that what is timed is the device and not Python's launches.
    """
    call()
    if where.type == "cpu":
        times = []
        for _ in range(min(repeats, 2)):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    import triton

    torch.cuda.synchronize(where)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return float(triton.testing.do_bench(graph.replay, warmup=20, rep=60, return_mode="median")) * 1e-3


def ceilings(where: torch.device) -> dict[str, float]:
    """Bytes/s of a large copy (read plus written) and bfloat16 FLOP/s of a large matrix product, on this device, now."""
    size = 1 << (28 if where.type == "cuda" else 20)
    source = torch.randn(size // 4, device=where)
    target = torch.empty_like(source)
    side = 8192 if where.type == "cuda" else 128
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=where).to(dtype) for _ in range(2))
    return {
        "bytes_per_s": 2 * source.nbytes / seconds(lambda: target.copy_(source), where),
        "flops_per_s": 2 * side**3 / seconds(lambda: torch.matmul(a, b), where),
    }


def describe(where: torch.device) -> dict[str, str]:
    import transformers
    import triton

    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {platform.machine()} (figures say nothing of a GPU)"
    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    return {"device": name, **versions, "python": platform.python_version()}


def report(
    title: str, where: torch.device, rows: Sequence[dict[str, Any]], extra: dict[str, Any], *, as_json: bool, out: Path | None
) -> None:
    """A table of `rows` on stdout, or one JSON object; `out` gets the JSON in any case."""
    record = {"benchmark": title, **describe(where), **extra, "rows": list(rows)}
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
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
