"""Fixtures of engine tests."""

from __future__ import annotations

import numpy as np
import pytest

from engine import engine as engine_module
from engine.speculation.cost_model import CostModel, Load
from engine.speculation.speculator import Speculator


@pytest.fixture
def fixed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step times come from a staircase (tokens come in packs of eight), not from this machine: every run decides the same."""
    monkeypatch.setattr(CostModel, "curve", lambda self, tokens: 1.0 + 0.005 * (np.asarray(tokens) // 8))
    monkeypatch.setattr(Speculator, "learn_cost", lambda self, load, seconds: None)
    monkeypatch.setattr(engine_module, "measure_steps", lambda runner, count, tokens: [(Load(1, 1, 1), 1.0)])
