"""The GPU engine benchmark at toy size: rows come as they are measured, its time holds, the planner's choice follows what was measured."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from tests.benchmarks import gpu_engine
from tests.benchmarks.gpu_common import Deadline
from tests.benchmarks.gpu_decode import DRAFTS, Slots, bias_for, union
from tests.benchmarks.gpu_peer import Job, Peer, Ran


def rows_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path, *arguments: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["gpu_engine", "--tiny", "--json", "--out", str(path), *arguments])
    gpu_engine.main()
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(path.read_text()) == printed
    return printed["rows"]


def test_parts_and_their_order(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    rows = rows_of(monkeypatch, capsys, tmp_path / "rows.json", "--parts", "decode,job")
    kinds = list(dict.fromkeys(row["run"] for row in rows))
    assert kinds == [
        "decode plain", "decode replayed, acceptance length 4", "decode planned, acceptance length 4",
        "decode planned, acceptance length 4, best", "first run: where its time goes", "job, engine", "job, engine: where its time goes",
    ]  # fmt: skip
    first, _, where = rows[-3:]
    assert first["prompt tokens"] == where["prompt tokens"] == 3 * 40, "nothing of the first run helps the one that is measured"
    assert where["decode steps"] * where["mean rows"] == 3 * (4 - 1)


def test_what_was_measured_is_kept_when_time_is_over(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    left = iter((1.0,))  # asked before each row
    monkeypatch.setattr(Deadline, "left", property(lambda self: next(left, -1.0)))
    rows = rows_of(monkeypatch, capsys, tmp_path / "rows.json", "--parts", "decode,job")
    assert rows[0]["run"] == "decode plain"
    assert rows[1]["run"].startswith("stopped: 450 s are over")
    assert len(rows) == 2


def test_a_peer_that_hangs_is_stopped_in_time() -> None:
    peer = Peer("qwen3-8b", Job(10_000, 12, 400, (2,), 64), tiny=True)
    started = time.monotonic()
    peer.run(1.0)
    assert time.monotonic() - started < 5.0
    assert peer._process.poll() is not None


@pytest.mark.parametrize(("price", "expected"), [(0.0, DRAFTS), (0.1, 3), (1.0, 0)])
def test_the_planner_drafts_as_far_as_it_pays(price: float, expected: int) -> None:
    """A step costs 1, and `price` more for each draft a slot."""
    slots = Slots(None, 8, 64, None, None)  # type: ignore[arg-type]
    slots.seconds = {drafts: 1.0 + price * drafts for drafts in (0, 1, 3, 7)}
    gains = 1.0 + torch.tensor([bias_for(4.0) ** j for j in range(1, DRAFTS + 1)]).cumsum(0)
    best = max(range(1, DRAFTS + 1), key=lambda drafts: float(gains[drafts - 1]) / (1.0 + 1.1 * price * drafts))
    assert slots.planned(4.0) == (expected if expected != 3 else best)


def test_overlapping_kernels_count_once() -> None:
    assert union([(1.0, 3.0), (2.0, 2.5), (2.0, 4.0), (6.0, 7.0)]) == (4.0, 6.0)
    assert union([]) == (0.0, 0.0)


def test_a_peer_that_was_stopped_gets_the_benefit_of_the_doubt() -> None:
    job = Job(256, 512, 128, (64,), 2048)
    assert Ran(64, 43, 43 * 128, 20.0, "sdpa").most(job) == (43 + 64) * 128 / 20.0
    assert Ran(64, 256, 256 * 128, 20.0, "sdpa").most(job) == 256 * 128 / 20.0
