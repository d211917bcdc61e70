"""Fixtures of engine tests."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest

from engine import engine as engine_module
from engine.speculation import speculator as speculator_module
from engine.speculation.cost_model import CostModel, Load
from engine.speculation.speculator import Speculator


@pytest.fixture
def fixed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step times come from a staircase (tokens come in packs of eight) and a draft pass takes a millisecond, whatever this machine is busy
    with: every run decides the same."""
    ticks = count(step=1_000_000)
    monkeypatch.setattr(speculator_module, "time", SimpleNamespace(perf_counter_ns=lambda: next(ticks)))
    monkeypatch.setattr(CostModel, "curve", lambda self, tokens: 1.0 + 0.005 * (np.asarray(tokens) // 8))
    monkeypatch.setattr(Speculator, "learn_cost", lambda self, load, seconds: None)
    monkeypatch.setattr(engine_module, "measure_steps", lambda runner, count, tokens: [(Load(1, 1, 1), 1.0)])
