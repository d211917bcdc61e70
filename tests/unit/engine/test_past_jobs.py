"""Engines one after the other on a machine: what the first learns of a drafter spares the next a trial, and no text depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import profile
from engine.batch import TargetModel
from engine.config import EngineConfig
from engine.drafters.base import DraftBatch, Drafts
from engine.drafters.dspark import DSparkDrafter
from engine.engine import Engine
from engine.lab.trace import read_trace
from engine.profile import Profiles
from engine.speculation.cost_model import Load
from engine.speculation.portfolio import Portfolio
from tests.unit.engine.drafters.layouts import deepspec, write
from tests.unit.engine.drafting import Loaded, jobs, run
from tests.unit.engine.hash_model import Letters
from tests.unit.engine.models.tiny import make_hf, make_lean

pytestmark = pytest.mark.usefixtures("fixed_costs")


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return make_lean(make_hf("qwen3"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, target: TargetModel) -> Path:
    """A target's folder with a drafter beside it."""
    root = tmp_path_factory.mktemp("packed")
    write(root / "drafters" / "dspark", *deepspec(target))
    return root


class Watch:
    """What drafters are asked for and shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = self.shown = 0
        propose, observe = DSparkDrafter.propose, DSparkDrafter.observe

        def proposed(drafter: DSparkDrafter, batch: DraftBatch) -> Drafts:
            self.passes += 1
            return propose(drafter, batch)

        def observed(drafter: DSparkDrafter, progress: Any) -> None:
            self.shown += len(progress.chunks)
            observe(drafter, progress)

        monkeypatch.setattr(DSparkDrafter, "propose", proposed)
        monkeypatch.setattr(DSparkDrafter, "observe", observed)

    def take(self) -> tuple[int, int]:
        found, self.passes, self.shown = (self.passes, self.shown), 0, 0
        return found


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 5}])
def test_an_engine_begins_with_what_the_one_before_it_learned(
    target: TargetModel, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    monkeypatch.setattr(profile, "measure_steps", lambda *_: [(Load(1, 1, 1), 1.0)])
    made = jobs(16, max_tokens=40, **sampling)
    plain, _ = run(target, made, "off")
    learn = Portfolio.learn_seconds
    # A pass that takes as long as many steps pays nowhere; neither does taking in hidden states.
    monkeypatch.setattr(Portfolio, "learn_seconds", lambda self, name, requests, _: learn(self, name, requests, 1e3))
    monkeypatch.setattr(
        Portfolio, "learn_intake", lambda self, name, tokens, _: self._members[name].past.intake.learn(tokens, tokens * 1.0)
    )
    watch, took = Watch(monkeypatch), []
    for _ in range(3):
        engine = Engine(
            Loaded(target, Letters(), packed),
            EngineConfig(kv_bytes=4 << 20, block_size=4, max_step_tokens=64, max_draft_tokens=6, seed=3, max_sequences=8),
            Profiles(tmp_path),
        )
        assert {result.id: result.token_ids for result in engine.run(iter(made))} == plain
        took.append(watch.take())
    assert took[0][0] >= 3
    assert took[0][1] > 16
    assert took[2] == (0, 0)
    (file,) = (tmp_path / "drafter-records").iterdir()
    assert file.name.startswith("dspark-")
    # A file that is not whole is as if there were none.
    file.write_text(file.read_text()[:-9])
    engine = Engine(
        Loaded(target, Letters(), packed), EngineConfig(kv_bytes=4 << 20, block_size=4, max_sequences=8, seed=3), Profiles(tmp_path)
    )
    assert {result.id: result.token_ids for result in engine.run(iter(made))} == plain
    assert watch.take()[0] >= 3


def test_without_a_place_for_profiles_every_engine_begins_anew(target: TargetModel, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    for _ in range(2):
        run(target, jobs(6), "auto", packed)
        assert watch.take()[0] > 0


def test_a_trace_says_what_the_engine_knew_of_its_drafters(
    target: TargetModel, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "measure_steps", lambda *_: [(Load(1, 1, 1), 1.0)])
    known = []
    for number in range(2):
        path = tmp_path / f"{number}.trace"
        config = EngineConfig(kv_bytes=4 << 20, block_size=4, max_sequences=8, seed=3, trace=path)
        list(Engine(Loaded(target, Letters(), packed), config, Profiles(tmp_path)).run(iter(jobs(6))))
        known.append(set(read_trace(path).engine.experience))
    assert known == [set(), {"dspark"}]
