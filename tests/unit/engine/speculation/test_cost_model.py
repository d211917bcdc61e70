"""The cost model against machines it must be able to describe."""

from __future__ import annotations

import numpy as np
import pytest

from engine.speculation.cost_model import CostModel, Load


def seconds(load: Load) -> float:
    """Two CPU cores: flat to 8 tokens, then linear; the output head per row; KV bytes; attention's arithmetic."""
    return 0.02 + 0.002 * max(load.tokens - 8, 0) + 0.0005 * load.rows + 1e-6 * load.kv_tokens + 1e-7 * load.pairs


def random_load(rng: np.random.Generator) -> Load:
    tokens, kv_tokens = int(rng.integers(1, 256)), int(rng.integers(100, 40_000))
    return Load(tokens, int(rng.integers(1, 64)), kv_tokens, tokens * int(rng.integers(1, 1000)))


def profiled(max_tokens: int = 256) -> CostModel:
    model = CostModel(max_tokens)
    model.profile([(Load(n, n, n), seconds(Load(n, n, n))) for n in (1, 2, 4, 8, 16, 32, 64)])
    return model


def test_a_profile_is_reproduced_at_its_points() -> None:
    model = profiled()
    for size in (1, 8, 64):
        assert model.predict(Load(size, size, size)) == pytest.approx(seconds(Load(size, size, size)), rel=0.01)


def test_running_steps_correct_the_profile_within_five_percent() -> None:
    model = profiled()
    rng = np.random.default_rng(0)
    for _ in range(400):
        load = random_load(rng)
        model.observe(load, seconds(load) * rng.normal(1.0, 0.03))
    errors = []
    for _ in range(200):
        load = random_load(rng)
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


def test_steps_that_a_neighbour_slows_do_not_pull_predictions_up_to_their_mean() -> None:
    model, usual = profiled(), Load(16, 16, 1000)
    rng = np.random.default_rng(2)
    predicted = []
    for _ in range(400):
        model.observe(usual, seconds(usual) * (1.5 if rng.random() < 0.2 else 1.0))
        predicted.append(model.predict(usual) / seconds(usual))
    assert np.median(predicted[100:]) < 1.05  # the mean step takes 1.1


def test_all_steps_at_once_become_slower_and_none_has_to_be_seen_again_for_that() -> None:
    model = profiled()
    for _ in range(60):
        model.observe(Load(8, 8, 800, 800), 1.4 * seconds(Load(8, 8, 800, 800)))
    other = Load(64, 64, 64)
    assert model.predict(other) > 1.1 * seconds(other)


def test_a_size_that_is_seen_often_does_not_come_down_alone() -> None:
    """What drafts add to a step of 48 is a difference: sizes that a run never has must come down with those that it has."""

    def added(model: CostModel) -> float:
        return model.predict(Load(64, 64, 7200, 9600)) - model.predict(Load(48, 48, 7200, 7200))

    model = profiled()
    before = added(model)
    for _ in range(200):
        load = Load(64, 64, 7200, 9600)
        model.observe(load, 0.85 * seconds(load))
    assert model.predict(load) == pytest.approx(0.85 * seconds(load), rel=0.02)
    assert added(model) == pytest.approx(0.85 * before, rel=0.15)


def test_what_a_profile_of_prompts_and_contexts_says_is_told_apart() -> None:
    model = CostModel(512)
    decoding = [Load(n, n, n * context, n * context) for n in (1, 8, 64) for context in (1, 160)]
    prompts = [Load(n, 1, n, n * (n + 1) // 2) for n in (64, 128, 256, 512)]
    model.profile([(load, seconds(load)) for load in (*decoding, *prompts)])
    for load in (Load(200, 1, 200, 20_100), Load(32, 32, 32 * 300, 32 * 300), Load(68, 17, 1200, 20_400)):
        assert model.predict(load) == pytest.approx(seconds(load), rel=0.1)


def test_nothing_is_known_before_the_first_step() -> None:
    model = CostModel(64)
    assert not model.ready
    model.observe(Load(4, 4, 4), 0.5)
    assert model.ready
    assert model.predict(Load(4, 4, 4)) == pytest.approx(0.5)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        CostModel(0)
