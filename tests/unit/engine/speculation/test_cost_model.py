"""The cost model against machines it must be able to describe."""

from __future__ import annotations

import numpy as np
import pytest

from engine.speculation.cost_model import CostModel, Load


def seconds(load: Load) -> float:
    """Two CPU cores: flat to 8 tokens, then linear; the output head per row; KV bytes."""
    return 0.02 + 0.002 * max(load.tokens - 8, 0) + 0.0005 * load.rows + 1e-6 * load.kv_tokens


def profiled(max_tokens: int = 256) -> CostModel:
    model = CostModel(max_tokens)
    model.profile([(Load(n, n, n), seconds(Load(n, n, n))) for n in (1, 2, 4, 8, 16, 32, 64)])
    return model


def test_a_profile_is_reproduced_at_its_points() -> None:
    model = profiled()
    for size in (1, 8, 64):
        assert model.predict(Load(size, size, size)) == pytest.approx(seconds(Load(size, size, size)), rel=1e-6)


def test_running_steps_correct_the_profile_within_five_percent() -> None:
    model = profiled()
    rng = np.random.default_rng(0)
    for _ in range(400):
        load = Load(int(rng.integers(1, 256)), int(rng.integers(1, 64)), int(rng.integers(100, 40_000)))
        model.observe(load, seconds(load) * rng.normal(1.0, 0.03))
    errors = []
    for _ in range(200):
        load = Load(int(rng.integers(1, 256)), int(rng.integers(1, 64)), int(rng.integers(100, 40_000)))
        errors.append(abs(model.predict(load) / seconds(load) - 1.0))
    assert np.median(errors) < 0.05


def test_a_machine_that_slows_down_is_followed() -> None:
    model = profiled()
    for _ in range(300):
        model.observe(Load(16, 16, 1000), 0.2)
    assert model.predict(Load(16, 16, 1000)) == pytest.approx(0.2, rel=0.1)


def test_one_interrupted_step_hardly_matters() -> None:
    model = profiled()
    before = model.predict(Load(8, 8, 8))
    for _ in range(100):
        model.observe(Load(8, 8, 8), before)
    model.observe(Load(8, 8, 8), 100 * before)
    for _ in range(8):
        model.observe(Load(8, 8, 8), before)
    assert model.predict(Load(8, 8, 8)) == pytest.approx(before, rel=0.1)


def test_more_tokens_never_cost_less() -> None:
    model = CostModel(128)
    rng = np.random.default_rng(1)
    for _ in range(100):
        model.observe(Load(int(rng.integers(1, 128)), 1, 10), float(rng.uniform(0.01, 0.1)))
    assert (np.diff(model.curve(np.arange(1, 400))) >= 0).all()


def test_nothing_is_known_before_the_first_step() -> None:
    model = CostModel(64)
    assert not model.ready
    model.observe(Load(4, 4, 4), 0.5)
    assert model.ready
    assert model.predict(Load(4, 4, 4)) == pytest.approx(0.5)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        CostModel(0)
