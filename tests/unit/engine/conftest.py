"""Fixtures of engine tests."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine import engine as engine_module
from engine.batch import TargetModel
from engine.speculation import speculator as speculator_module
from engine.speculation.cost_model import CostModel, Load
from engine.speculation.speculator import Speculator
from tests.unit.engine.drafters.layouts import write_blocks
from tests.unit.engine.models.tiny import make_hf, make_lean


@pytest.fixture
def fixed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step times come from a staircase (tokens come in packs of eight) and a draft pass takes a millisecond, whatever this machine is busy
    with: every run decides the same."""
    ticks = count(step=1_000_000)
    monkeypatch.setattr(speculator_module, "time", SimpleNamespace(perf_counter_ns=lambda: next(ticks)))
    monkeypatch.setattr(CostModel, "curve", lambda self, tokens: 1.0 + 0.005 * (np.asarray(tokens) // 8))
    monkeypatch.setattr(Speculator, "learn_cost", lambda self, load, seconds: None)
    monkeypatch.setattr(engine_module, "measure_steps", lambda runner, count, tokens: [(Load(1, 1, 1), 1.0)])


@pytest.fixture(scope="module")
def block_target() -> TargetModel:
    """What the drafters of `block_drafters` draft for."""
    return make_lean(make_hf("qwen3", max_position_embeddings=128))


@pytest.fixture(scope="module")
def block_drafters(tmp_path_factory: pytest.TempPathFactory, block_target: TargetModel) -> Path:
    """The folder that `write_blocks` makes, with a drafter in each folder of it."""
    return write_blocks(tmp_path_factory.mktemp("drafters"), block_target)
