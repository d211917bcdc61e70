"""Runners that need no host between steps, on a CPU: one that computes at once, and one that computes when somebody waits for it.

The second is a device that is always behind: a step is computed from what it was given at its launch, after the host has gone on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine import engine as engine_module
from engine.batch import ForwardOutput, TargetModel
from engine.graphs import DirectCapture, GraphRunner
from engine.kv_pool import KVPool
from engine.runner import PackedStep, Runner
from engine.speculation.judge import Decision, DeviceJudge, Pending


class GraphsOnCpu(GraphRunner):
    """The runner of a GPU with a call in place of each capture."""

    def __init__(self, model: TargetModel, kv: KVPool, max_sequences: int) -> None:
        super().__init__(model, kv, max_sequences, DirectCapture(), memory=1 << 30)


class Queue(Runner):
    """Runs nothing before `catch_up`, except where there is nobody to wait for it later (while the engine measures itself)."""

    def __init__(self, model: TargetModel, kv: KVPool, max_sequences: int) -> None:
        super().__init__(model, kv, max_sequences)
        self.queue: list[Callable[[], None]] = []
        self.launched: PackedStep | None = None
        self.copies: NDArray[np.int64] | None = None
        """Of the step that is launched next."""
        self.live = False
        self.deepest = 0

    def run(self, step: PackedStep, taps: tuple[int, ...] = (), *, peaks: bool = False) -> ForwardOutput:
        if not self.live:
            return super().run(step, taps)
        assert not taps
        self.launched = step
        return ForwardOutput(torch.zeros(len(step.logit_rows), self.model.spec.vocab_size))

    def copy(self, slots: NDArray[np.int64]) -> None:
        if self.live:
            self.copies = slots
        else:
            super().copy(slots)

    def compute(self, step: PackedStep, copies: NDArray[np.int64] | None) -> torch.Tensor:
        if copies is not None:
            super().copy(copies)
        return super().run(step).logits

    def catch_up(self, until: Callable[[], bool]) -> None:
        self.deepest = max(self.deepest, len(self.queue))
        while not until():
            self.queue.pop(0)()


class LateJudge:
    def __init__(self, runner: Queue) -> None:
        assert runner.latest is not None
        self._runner, self._judge = runner, DeviceJudge(runner.latest)

    def __call__(self, logits, rows, row_counts, slots, attempt, probabilities, rules, wanted) -> Pending:
        runner, judge, step = self._runner, self._judge, self._runner.launched
        assert step is not None
        copies, runner.copies = runner.copies, None
        found: list[Decision] = []
        asked = (rows, row_counts, slots, attempt, probabilities, rules, wanted)
        runner.queue.append(lambda: found.append(judge(runner.compute(step, copies), *asked).read()))

        class Later:
            def read(self) -> Decision:
                runner.catch_up(lambda: bool(found))
                return found[0]

        return Later()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines get the runner of a GPU."""
    monkeypatch.setattr(engine_module, "make_runner", GraphsOnCpu)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[Queue]:
    """Engines get a device that is behind. The queues of those that are made."""
    made: list[Queue] = []

    def make_judge(runner: Queue) -> LateJudge:
        made.append(runner)
        return LateJudge(runner)

    monkeypatch.setattr(engine_module, "make_runner", Queue)
    monkeypatch.setattr(engine_module, "make_judge", make_judge)
    return made
