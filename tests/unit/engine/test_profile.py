"""A profile is of the machine, not of what else ran while it was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine import profile
from engine.profile import Profiles, from_json, to_json, undisturbed
from engine.speculation.cost_model import Load
from tests.unit.engine.test_engine import engine

if TYPE_CHECKING:
    from pathlib import Path

    from engine.runner import PackedStep, Runner


class Machine:
    """In place of the clock: a step takes 10 ms and 1 ms a token, and `delays` more, one a step while there are any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.delays: list[float] = []
        self.steps = 0
        monkeypatch.setattr(profile, "_seconds", self.seconds)

    def seconds(self, runner: Runner, step: PackedStep) -> float:
        del runner
        self.steps += 1
        return 0.010 + 0.001 * len(step.token_ids) + (self.delays.pop(0) if self.delays else 0.0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def runner() -> Runner:
    return engine(drafter="off")._runner


def is_true(points: list[tuple[Load, float]]) -> bool:
    return all(seconds == pytest.approx(0.010 + 0.001 * load.tokens) for load, seconds in points)


def test_on_a_quiet_machine_steps_are_measured_twice(runner: Runner, machine: Machine) -> None:
    points = profile.measure_steps(runner, 8, 64)
    assert is_true(points)
    assert machine.steps == 2 * len(points)


def test_steps_that_were_disturbed_are_measured_until_no_more_is_gained(runner: Runner, machine: Machine) -> None:
    count = len(profile.measure_steps(runner, 8, 64))
    machine.steps = 0
    machine.delays = [0.0 if turn == number % 4 else 0.5 for turn in range(4) for number in range(count)]
    assert is_true(profile.measure_steps(runner, 8, 64))
    assert machine.steps == 5 * count, "every step had one good turn of four, and the fifth found nothing more"


def test_a_small_step_takes_no_longer_than_a_larger_one() -> None:
    one, eight, prompt = Load(1, 1, 1, 1), Load(8, 8, 8, 8), Load(8, 1, 8, 36)
    found = dict(undisturbed([(one, 0.85), (eight, 0.47), (prompt, 0.20)]))
    assert found == {one: 0.20, eight: 0.47, prompt: 0.20}, "a prompt has fewer logits than eight sequences: it says nothing of them"


def test_a_profile_of_a_busy_time_is_measured_again_and_kept(runner: Runner, machine: Machine, tmp_path: Path) -> None:
    profiles, spec = Profiles(tmp_path), runner.model.spec
    points, reused = profiles.steps(runner, spec, 8, 64)
    assert (is_true(points), reused) == (True, False)
    assert profiles.steps(runner, spec, 8, 64) == (points, True)
    (file,) = (tmp_path / "profiles").glob("*/steps.json")
    file.write_text(to_json([(load, 3 * seconds) for load, seconds in points]))
    assert profiles.steps(runner, spec, 8, 64) == (points, False)
    assert from_json(file.read_text()) == points
    # The other way round it is now that the machine is busy.
    file.write_text(to_json([(load, seconds / 3) for load, seconds in points]))
    assert profiles.steps(runner, spec, 8, 64)[1]


def test_a_spoilt_profile_is_mended(runner: Runner, machine: Machine, tmp_path: Path) -> None:
    del machine
    profiles, spec = Profiles(tmp_path), runner.model.spec
    points, _ = profiles.steps(runner, spec, 8, 64)
    (file,) = (tmp_path / "profiles").glob("*/steps.json")
    for spoilt in ("[[1, 1", "{}", "[[1, 1, 1, 1, -1.0]]", "[[1]]"):
        file.write_text(spoilt)
        assert profiles.steps(runner, spec, 8, 64) == (points, False)
        assert profiles.steps(runner, spec, 8, 64) == (points, True)
