"""Tokens a second of the engine on a GPU: `python -m tests.benchmarks.gpu_engine [--tiny] [--json] [--out FILE] [--models NAMES]`.

- decode steps, plain, with replayed drafts and as the planner chooses: `tests.benchmarks.gpu_decode`;
- a job through `Engine.run`, and through transformers' continuous batching: `tests.benchmarks.gpu_job`.

Rows are written (stderr, and the file named by `--out`) as they are measured, those with goals first.

Models: Qwen3-8B's shapes with random weights, and the packaged SmolLM2-135M. Without a GPU a toy runs through the same code (`--tiny`, then
the default): that shows that the command works, and nothing about speed.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.gpu_common import Deadline, Row, device, empty, report, save, whatever_happens
from tests.benchmarks.gpu_decode import Steps, decode_rows
from tests.benchmarks.gpu_job import job_of, job_rows, peer_rows
from tests.benchmarks.gpu_models import load
from tests.benchmarks.gpu_peer import Peer


def model_rows(name: str, place: torch.device, parts: set[str], until: Deadline, *, tiny: bool) -> Iterator[Row]:
    """parts: of "decode", "job" and "peer"."""
    steps, job = Steps.of(tiny=tiny), job_of(tiny=tiny)
    peer = Peer(name, job, tiny=tiny) if "peer" in parts else None
    try:
        called, model, drafter = load(name, place, tiny=tiny)
        for context in steps.batches if "decode" in parts else ():
            for row in whatever_happens(f"decode at {context}", decode_rows(model, drafter, context, steps, until)):
                yield {"model": called, **row}
            empty(place)
        del drafter
        empty(place)
        ours = 0.0
        for row in whatever_happens("job", job_rows(model, job, until)) if "job" in parts else ():
            ours = row.get("tokens/s", ours)
            yield {"model": called, **row}
        del model
        empty(place)
        if peer is not None:
            for row in whatever_happens("peer", peer_rows(peer, job, ours, until)):
                yield {"model": called, **row}
    finally:
        if peer is not None:
            peer.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy shapes; always so without a GPU")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="file for the JSON, besides what is printed")
    parser.add_argument("--within", type=float, default=450.0, help="seconds after which nothing further is begun")
    parser.add_argument("--models", help="comma-separated: qwen3-8b, smollm2-135m")
    parser.add_argument("--configurations", type=Path, help="folder of launch configurations that `tests.benchmarks.kernels --tune` found")
    parser.add_argument("--parts", default="decode,job,peer", help="comma-separated: which of the three")
    options = parser.parse_args()
    until = Deadline(options.within)
    # Where it hangs, if it does; the rows so far are in the file.
    faulthandler.dump_traceback_later(options.within + 20, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        measure(options, until)
    finally:
        faulthandler.cancel_dump_traceback_later()


def measure(options: argparse.Namespace, until: Deadline) -> None:
    place = device()
    tiny = options.tiny or place.type == "cpu"
    torch.manual_seed(0)
    extra: dict[str, Any] = {"acceptance": "replayed from independent coins where a row says so"}
    if options.configurations is not None and place.type == "cuda":
        from kernels.triton import tuning

        extra["tuned launch configurations"] = tuning.load(options.configurations, place)
    names = options.models.split(",") if options.models else ["qwen3-8b"] if tiny else ["qwen3-8b", "smollm2-135m"]
    rows: list[Row] = []
    if tiny:
        extra["sizes"] = "toy: rates mean nothing"

    def add(row: Row) -> None:
        rows.append(row)
        sys.stderr.write(f"{until.passed:6.1f} s  {row}\n")
        if options.out is not None:  # whatever stops the run, what was measured is kept
            save("gpu_engine", place, rows, {**extra, "unfinished": True}, options.out)

    for name in names:
        try:
            for row in model_rows(name, place, set(options.parts.split(",")), until, tiny=tiny):
                add(row)
        except TimeoutError as error:
            add({"model": name, "run": f"stopped: {error}"})
    extra["seconds"] = round(until.passed, 1)
    report("gpu_engine", place, rows, extra, as_json=options.json, out=options.out)


if __name__ == "__main__":
    sys.exit(main())
