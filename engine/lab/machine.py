"""Machines for virtual time: one fitted to a trace, and one given by a curve."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from engine.lab.line import fit_line
from engine.lab.step_fit import StepFit
from engine.speculation.cost_model import Load

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.lab.trace import StepRecord, Trace


class CurveMachine:
    """Step seconds by number of tokens (straight lines between, and beyond at the last point's price a token); the host takes no time."""

    def __init__(self, curve: Mapping[int, float], *, seconds_per_kv_token: float = 0.0) -> None:
        points = sorted(curve.items())
        self._tokens = np.array([tokens for tokens, _ in points], np.float64)
        self._seconds = np.array([seconds for _, seconds in points], np.float64)
        self._per_kv_token = seconds_per_kv_token

    def step(self, load: Load) -> float:
        beyond = max(load.tokens - self._tokens[-1], 0.0) * self._seconds[-1] / self._tokens[-1]
        return float(np.interp(load.tokens, self._tokens, self._seconds) + beyond + self._per_kv_token * load.kv_tokens)

    def overhead(self, chunks: int) -> float:
        del chunks
        return 0.0

    def profile(self, sizes: list[int]) -> list[tuple[Load, float]]:
        """What measuring steps of so many tokens (a sequence each) would give: the start of a cost model that knows this machine."""
        return [(Load(size, size, size), self.step(Load(size, size, size))) for size in sizes]


class RecordedMachine:
    """Fitted to a trace: steps by `StepFit`, host time by a line in the number of chunks."""

    def __init__(self, trace: Trace) -> None:
        profile = [(Load(*sizes), seconds) for *sizes, seconds in trace.engine.profile]
        self._fit = StepFit([(step.load, step.seconds) for step in trace.steps], profile)
        # The fit heeds slow steps less than others, but they took their time all the same: the sum over the trace must be right.
        fitted = sum(self._fit.seconds(step.load) for step in trace.steps)
        self._slower = sum(step.seconds for step in trace.steps) / fitted if fitted else 1.0
        self._fixed, self._per_chunk = _host_time(trace.steps)

    def step(self, load: Load) -> float:
        return self._slower * self._fit.seconds(load)

    def overhead(self, chunks: int) -> float:
        return self._fixed + self._per_chunk * chunks


def _host_time(steps: list[StepRecord]) -> tuple[float, float]:
    """(seconds a step, seconds a chunk) between the end of one step and the start of the next, from medians by number of chunks.

    Medians, so that a pause of the source (it was awaited for seconds) does not count as work.
    """
    gaps: dict[int, list[float]] = defaultdict(list)
    for step, following in pairwise(steps):
        gaps[step.chunks].append(max(following.at - step.at - step.seconds - step.draft_seconds, 0.0))
    if not gaps:
        return 0.0, 0.0
    sizes = np.array(list(gaps), np.float64)
    typical = np.array([np.median(values) for values in gaps.values()])
    return fit_line(sizes, typical, np.array([len(values) for values in gaps.values()], np.float64))
