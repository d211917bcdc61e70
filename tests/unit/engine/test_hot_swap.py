"""Drafters that come, change and go while an engine runs: requests in flight stay exact, and the next step drafts with what is there."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.batch import TargetModel
from engine.config import EngineConfig
from engine.drafters import sources
from engine.engine import Engine
from engine.speculation.speculator import Speculator
from engine.types import Request, Result
from tests.unit.engine.drafters.layouts import deepspec, eagle, write, zlab
from tests.unit.engine.drafting import Loaded, jobs
from tests.unit.engine.hash_model import Letters
from tests.unit.engine.models.tiny import make_hf, make_lean

pytestmark = pytest.mark.usefixtures("fixed_costs")


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return make_lean(make_hf("qwen3"))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder without drafters; its engines look for some before every step, and use every one as much as they can."""
    monkeypatch.setattr(sources, "registry_folders", lambda: [tmp_path / "registry"])
    monkeypatch.setattr("engine.drafter_changes._LOOK_SECONDS", 0.0)
    monkeypatch.setattr("engine.engine._RECLAIM_EVERY", 1)
    (tmp_path / "model" / "drafters").mkdir(parents=True)
    return tmp_path / "model"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who was asked for drafts, in order."""
    names: list[str] = []
    ask = Speculator._ask

    def watch(self: Speculator, name: str, *rest: object) -> object:
        names.append(name)
        return ask(self, name, *rest)

    monkeypatch.setattr(Speculator, "_ask", watch)
    return names


def make(target: TargetModel, directory: Path) -> Engine:
    config = EngineConfig(kv_bytes=4 << 20, block_size=4, max_step_tokens=64, max_draft_tokens=6, seed=3, max_sequences=4)
    return Engine(Loaded(target, Letters(), directory), config)


def plain(target: TargetModel, made: list[Request]) -> dict[str, tuple[int, ...]]:
    config = EngineConfig(kv_bytes=4 << 20, block_size=4, max_step_tokens=64, max_sequences=4, drafter="off", seed=3)
    return {result.id: result.token_ids for result in Engine(Loaded(target, Letters()), config).run(iter(made))}


def run(engine: Engine, made: list[Request], events: dict[int, Callable[[], object]]) -> dict[str, tuple[int, ...]]:
    """Feeds the requests one step apart; before the n-th is handed over, events[n] happens, while those before it are in flight."""

    def feed() -> Iterator[Request | None]:
        for number, request in enumerate(made):
            if number in events:
                events[number]()
            yield request
            yield None

    answers: dict[str, tuple[int, ...]] = {}
    results: Iterator[Result] = engine.run(feed())
    for result in results:
        answers[result.id] = result.token_ids
    return answers


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 5}])
def test_drafters_come_and_change_while_requests_are_in_flight(
    target: TargetModel, model: Path, asked: list[str], sampling: dict[str, float]
) -> None:
    made = jobs(14, max_tokens=20, **sampling)
    expected = plain(target, made)
    engine = make(target, model)
    assert engine.drafters.members == ("suffix",)
    place, marks = model / "drafters", {}

    def comes(name: str, checkpoint: tuple) -> Callable[[], None]:
        def event() -> None:
            shutil.rmtree(place / name, ignore_errors=True)
            write(place / f".{name}", *checkpoint)
            (place / f".{name}").rename(place / name)
            marks[name, len(marks)] = len(asked)

        return event

    events = {
        2: comes("spark", deepspec(target)),
        5: comes("eagle", eagle("original")),
        8: comes("spark", deepspec(target, "rnn")),
        11: comes("spark", zlab()),
    }
    assert run(engine, made, events) == expected
    assert set(engine.drafters.members) == {"suffix", "spark", "eagle"}
    first, second, third, last = marks.values()
    assert "spark" not in asked[:first]
    assert "spark" in asked[first:second]
    assert "eagle" not in asked[:second]
    assert {"spark", "eagle"} & set(asked[second:third])
    assert "spark" in asked[third:last] or "spark" in asked[last:]
    assert engine.stats().drafted > 0


def test_what_is_broken_is_passed_over_and_the_one_before_it_goes_on(
    target: TargetModel, model: Path, asked: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    made = jobs(12, max_tokens=20)
    place = model / "drafters"
    write(place / "spark", *deepspec(target))
    engine = make(target, model)

    def tear() -> None:
        """Half of a file, as a copy that is under way leaves it, and a folder without weights."""
        weights = place / "spark" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        (place / "empty").mkdir()
        shutil.copy(place / "spark" / "config.json", place / "empty")
        asked.append("torn")

    with caplog.at_level(logging.WARNING):
        assert run(engine, made, {4: tear}) == plain(target, made)
    assert "the drafter spark is not used as it is now: " in caplog.text
    assert "the drafter empty is not used as it is now: " in caplog.text
    assert "spark" in asked[asked.index("torn") :]
    assert engine.drafters.members == ("suffix", "spark")


def test_a_drafter_that_was_let_go_comes_back_when_it_is_exchanged(
    target: TargetModel, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.speculation import portfolio

    monkeypatch.setattr(portfolio, "_PATIENCE", 5)
    monkeypatch.setattr(portfolio.Portfolio, "_gains", lambda _, __, slots, *rest: np.full(len(slots), -1.0))
    place = model / "drafters"
    write(place / "spark", *deepspec(target))
    engine = make(target, model)
    made = jobs(8, max_tokens=20)
    assert run(engine, made, {}) == plain(target, made)
    assert engine.drafters.members == ("suffix",)
    assert run(engine, made[:2], {}) == plain(target, made[:2])
    assert engine.drafters.members == ("suffix",)
    monkeypatch.setattr(portfolio, "_PATIENCE", 10**6)
    write(place / "spark", *deepspec(target, "gated"))
    assert run(engine, made, {}) == plain(target, made)
    assert engine.drafters.members == ("suffix", "spark")


def test_tags_change_while_the_engine_runs(target: TargetModel, model: Path) -> None:
    from engine.checkpoints.drafters import read_folder
    from engine.training.export import set_tags

    write(model / "drafters" / "spark", *deepspec(target))
    engine = make(target, model)
    assert engine.drafters.tags("spark") == ()
    assert set_tags(read_folder(model / "drafters" / "spark"), ["mail", "code", "mail"]) == ["code", "mail"]
    made = jobs(3)
    assert run(engine, made, {}) == plain(target, made)
    assert engine.drafters.tags("spark") == ("code", "mail")
