"""Drafting inside the device's steps, through the engine: the texts of plain decoding, and the accounts of drafting between steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import engine as engine_module
from engine.batch import TargetModel
from engine.config import EngineConfig
from engine.device_decoding import DeviceDecoding, suits
from engine.drafters.base import DraftBatch, Drafts
from engine.drafters.dspark import DSparkDrafter
from engine.drafters.parts.on_device import DeviceBlocks
from engine.engine import Engine
from engine.pipeline import DecodePipeline
from engine.sequence import Sequence
from engine.speculation import ways
from engine.speculation.planner import Planner, StepCost
from engine.speculation.portfolio import Portfolio
from engine.speculation.speculator import Speculator
from engine.speculation.ways import Ways
from engine.types import FinishReason, Request, Result, SamplingParams
from tests.unit.engine.drafters.layouts import VOCAB, deepspec, write
from tests.unit.engine.drafting import Loaded
from tests.unit.engine.hash_model import Letters
from tests.unit.engine.late import GraphsOnCpu
from tests.unit.engine.models.tiny import make_hf, make_lean
from tests.unit.engine.test_engine import assert_conserved

pytestmark = pytest.mark.usefixtures("fixed_costs")
WAY = Ways.on_device


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Engines get the runner of a GPU, and whatever may be drafted on the device is. What was done, step by step."""
    done: list[str] = []
    launch, leave = DeviceDecoding.launch, DeviceDecoding.leave

    def launched(self: DeviceDecoding, *args: Any) -> Any:
        flight = launch(self, *args)
        done.append("refused" if flight is None else "launched")
        return flight

    def left(self: DeviceDecoding, **fields: Any) -> None:
        done.append("left")
        leave(self, **fields)

    monkeypatch.setattr(DeviceDecoding, "launch", launched)
    monkeypatch.setattr(DeviceDecoding, "leave", left)
    monkeypatch.setattr(engine_module, "make_runner", GraphsOnCpu)
    monkeypatch.setattr(Ways, "on_device", lambda self, requests: True)
    return done


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that can be drafted is, by the drafter of hidden states, and is verified as far as steps have rows for it."""

    def choose(self: Planner, survival: np.ndarray, cost: StepCost, *, random: bool) -> np.ndarray:
        return np.diff(np.minimum(np.cumsum((survival > 0.0).sum(axis=1)), len(cost.extra) - 1), prepend=0)

    monkeypatch.setattr(Planner, "limits", lambda self, weights, cost, most: np.full(len(weights), most))
    monkeypatch.setattr(Planner, "choose", choose)
    monkeypatch.setattr(Portfolio, "choose", lambda self, slots, *rest: [self.neural[0]] * len(slots))


def jobs(count: int, **sampling: Any) -> list[Request]:
    rng = np.random.default_rng(4)
    made = []
    for number in range(count):
        prompt = rng.integers(3, VOCAB, int(rng.integers(2, 14))).tolist()
        params = SamplingParams(**({"max_tokens": int(rng.integers(5, 40)), "temperature": 0.0, "ignore_eos": True} | sampling))
        made.append(Request(str(number), tuple(prompt), params))
    return made


def make(target: TargetModel, drafter: str | Path, **fields: Any) -> Engine:
    config = {"kv_bytes": 8 << 20, "block_size": 4, "max_step_tokens": 64, "max_draft_tokens": 6, "seed": 3, "max_sequences": 8} | fields
    return Engine(Loaded(target, Letters()), EngineConfig(drafter=str(drafter), **config))


def answers(engine: Engine, requests: list[Request]) -> dict[str, Result]:
    return {result.id: result for result in engine.run(iter(requests))}


def texts(results: dict[str, Result]) -> dict[str, tuple[int, ...]]:
    return {name: result.token_ids for name, result in results.items()}


def assert_accounts(engine: Engine, results: dict[str, Result]) -> None:
    stats = engine.stats()
    ledgers = [result.ledger for result in results.values()]
    for ledger in ledgers:
        assert_conserved(ledger)
    for name in ("drafted", "verified", "accepted", "generated", "sampled"):
        assert sum(getattr(ledger, name) for ledger in ledgers) == getattr(stats, name), name
    assert sum(ledger.prefill_ns + ledger.decode_ns + ledger.draft_ns for ledger in ledgers) == stats.busy_ns
    assert (stats.running, stats.kv_blocks_held, stats.finished) == (0, 0, len(results))
    engine._pool.check()


@pytest.mark.parametrize(("drafter", "count"), [("dspark", 1), ("dspark", 8), ("gated", 3), ("dflash", 3), ("small", 3)])
def test_greedy_texts_are_plain_decodings(
    block_target: TargetModel, block_drafters: Path, on_device: list[str], drafter: str, count: int
) -> None:
    requests = jobs(count)
    plain = texts(answers(make(block_target, "off"), requests))
    engine = make(block_target, block_drafters / drafter)
    results = answers(engine, requests)
    assert texts(results) == plain
    assert on_device.count("launched") > 10
    assert on_device.count("left") <= 5, "a request that ends sends the others to fewer seats now and then, and nowhere else"
    assert engine.stats().verified > 10
    assert count > 1 or engine.stats().steps == engine._steps, "a step that nobody needed any more is accounted for as well"
    assert_accounts(engine, results)


@pytest.mark.parametrize("sampling", [{"temperature": 0.8}, {"temperature": 1.3, "top_k": 20}, {"temperature": 1.0, "top_p": 0.7}])
def test_seeded_texts_are_plain_decodings(block_target: TargetModel, block_drafters: Path, on_device: list[str], sampling: dict) -> None:
    requests = [
        replace(request, sampling=replace(request.sampling, seed=7, sample=number % 2, **(sampling if number != 3 else {})))
        for number, request in enumerate(jobs(6))
    ]
    plain = texts(answers(make(block_target, "off"), requests))
    engine = make(block_target, block_drafters / "dspark", seed=99)
    results = answers(engine, requests)
    assert texts(results) == plain
    assert on_device.count("launched") > 10
    assert engine.stats().verified > 10
    assert_accounts(engine, results)


def test_requests_that_come_later_and_ends_that_nobody_foresaw(
    block_target: TargetModel, block_drafters: Path, on_device: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends by token and by string are found one step late; a request that comes takes the others off the device for its prompt."""
    requests = jobs(9, max_tokens=40)
    plain = answers(make(block_target, "off"), requests)
    requests = [
        replace(request, sampling=replace(request.sampling, stop_token_ids=(plain[request.id].token_ids[9 + 3 * int(request.id)],)))
        for request in requests
    ]
    expected = answers(make(block_target, "off"), requests)

    def coming() -> Iterator[Request | None]:
        for request in requests:
            yield request
            yield from [None] * 4

    land, collect, last = DeviceDecoding.land, DecodePipeline.collect, []

    def landed(self: DeviceDecoding, flight: Any) -> Any:
        found = land(self, flight)
        idle = [slot for slot in range(len(last[-1].counts)) if slot not in flight.lives]
        assert not last[-1].counts[idle].any(), "who has ended makes nothing any more"
        return found

    monkeypatch.setattr(DeviceDecoding, "land", landed)
    monkeypatch.setattr(DecodePipeline, "collect", lambda self: last.append(collect(self)) or last[-1])
    engine = make(block_target, block_drafters / "dspark")
    results = {result.id: result for result in engine.run(coming())}
    assert texts(results) == texts(expected)
    assert {result.finish_reason for result in results.values()} == {FinishReason.STOP}
    assert any(result.ledger.dropped for result in results.values())
    assert on_device.count("left") > 4
    assert on_device.count("launched") > 15
    assert_accounts(engine, results)


def test_what_the_host_must_see_stays_with_it(block_target: TargetModel, block_drafters: Path, on_device: list[str]) -> None:
    unfit = [{"temperature": 1.0}, {"logprobs": 1}, {"frequency_penalty": 0.5}, {"logit_bias": ((5, 1.0),)}, {"min_tokens": 3}]
    for change in unfit:
        requests = jobs(2, max_tokens=8, **change)
        assert not any(suits(request) for request in requests)
        plain, drafted = (texts(answers(make(block_target, drafter), requests)) for drafter in ("off", block_drafters / "dspark"))
        assert plain == drafted or change == {"temperature": 1.0}
    assert "launched" not in on_device


def test_memory_that_is_short_leaves_the_texts_alone(block_target: TargetModel, block_drafters: Path, on_device: list[str]) -> None:
    requests = jobs(6, max_tokens=50)
    plain = texts(answers(make(block_target, "off"), requests))
    block = 4 * (2 * 4 * 2 * 8 + 2 * 2 * 2 * 8) * 4
    engine = make(block_target, block_drafters / "dspark", kv_bytes=55 * block)
    results = answers(engine, requests)
    assert texts(results) == plain
    assert "refused" in on_device
    assert "launched" in on_device
    engine._pool.check()


def test_aborts_and_closed_runs_leave_sound_books(block_target: TargetModel, block_drafters: Path, on_device: list[str]) -> None:
    engine = make(block_target, block_drafters / "dspark")
    requests = jobs(6, max_tokens=40)
    results: dict[str, Result] = {}
    for result in engine.run(iter([*requests, replace(requests[0], id="short", sampling=replace(requests[0].sampling, max_tokens=12))])):
        results[result.id] = result
        engine.abort(["1", "2"])
    assert {results[name].finish_reason for name in ("1", "2")} == {FinishReason.ABORTED}
    assert_accounts(engine, results)
    running = engine.run(iter(jobs(4, max_tokens=9)))
    next(running)
    running.close()
    assert engine._pool.num_held == 0
    again = answers(engine, requests)
    assert texts(again) == texts(answers(make(block_target, "off"), requests))
    assert on_device.count("launched") > 20


def test_the_portfolio_goes_on_the_device_where_it_has_one_drafter(
    block_target: TargetModel, block_drafters: Path, on_device: list[str], tmp_path: Path
) -> None:
    (tmp_path / "drafters").mkdir()
    (tmp_path / "drafters" / "dspark").symlink_to(block_drafters / "dspark")
    requests = jobs(5, max_tokens=40)
    plain = texts(answers(make(block_target, "off"), requests))
    engine = Engine(
        Loaded(block_target, Letters(), tmp_path), EngineConfig(kv_bytes=8 << 20, block_size=4, max_step_tokens=64, max_sequences=8, seed=3)
    )
    assert engine.drafters.members == ("suffix", "dspark")
    results = answers(engine, requests)
    assert texts(results) == plain
    assert on_device.count("launched") > 10
    assert_accounts(engine, results)


def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[dict, dict]:
    """Drafts and bins by (request, length of its text), as drafted between steps and inside them."""
    between: dict[tuple[int, int], tuple] = {}
    inside: dict[tuple[int, int], tuple] = {}
    propose, late = DSparkDrafter.propose, Speculator.late

    def proposed(self: DSparkDrafter, batch: DraftBatch) -> Drafts:
        found = propose(self, batch)
        for row, sequence in enumerate(batch.sequences):
            count = int(found.lengths[row])
            drafts = found.token_ids[row, :count].tolist(), found.bins[row, :count].tolist()
            between[sequence.serial, sequence.num_tokens] = drafts
        return found

    def drafted_late(self: Speculator, name: str, sequences: list[Sequence], tokens: Any, bins: Any, drafted: Any, verified: Any) -> Any:
        for row, sequence in enumerate(sequences):
            if sequence.slot >= 0 and drafted[row]:
                drafts = tokens[row, : drafted[row]].tolist(), bins[row, : drafted[row]].tolist()
                inside[sequence.serial, sequence.num_tokens] = drafts
        return late(self, name, sequences, tokens, bins, drafted, verified)

    monkeypatch.setattr(DSparkDrafter, "propose", proposed)
    monkeypatch.setattr(Speculator, "late", drafted_late)
    return between, inside


@pytest.mark.parametrize("drafter", ["dspark", "dflash"])
def test_context_is_taken_in_inside_the_steps_and_found_after_them(
    block_target: TargetModel, block_drafters: Path, on_device: list[str], eager: None, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    """Wherever a draft is made, it is what the host would have drafted from the same text: on the device, and back from there."""
    between, inside = recorded(monkeypatch)
    requests = jobs(3, max_tokens=30)
    with monkeypatch.context() as host:
        host.setattr(Ways, "on_device", lambda self, requests: False)
        answers(make(block_target, block_drafters / drafter), requests)
    assert not inside
    expected = dict(between)
    between.clear()
    turns = iter([True] * 9 + [False] * 6 + [True] * 99)
    monkeypatch.setattr(Ways, "on_device", lambda self, requests: next(turns))
    answers(make(block_target, block_drafters / drafter), requests)
    for found in (inside, between):
        common = [key for key in found if key in expected]
        assert len(common) > 8
        width = [min(len(found[key][0]), len(expected[key][0])) for key in common]
        same = [
            found[key][0][:count] == expected[key][0][:count] and found[key][1][:count] == expected[key][1][:count]
            for key, count in zip(common, width, strict=True)
        ]
        assert sum(same) >= len(same) - 1, "arithmetic in another order may turn a tie"
    assert min(number for _, number in between) < max(number for _, number in inside)


def follower() -> tuple[TargetModel, Any]:
    """A target whose next token hangs on the last one most of all, and a drafter's checkpoint whose Markov head knows how."""
    hf = make_hf("qwen3", max_position_embeddings=128)
    with torch.no_grad():
        hf.model.embed_tokens.weight.mul_(60.0)
    model = make_lean(hf)
    config, tensors = deepspec(model, "vanilla", 48)
    frozen = model.frozen()
    tensors["markov_head.markov_w1.weight"] = frozen.norm(frozen.embedding).clone()
    tensors["markov_head.markov_w2.weight"] = 8.0 * tensors["lm_head.weight"]
    return model, (config, tensors)


def test_drafts_stand_as_often_as_those_that_are_made_between_steps(
    tmp_path: Path, on_device: list[str], eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, checkpoint = follower()
    folder = write(tmp_path / "follower", *checkpoint)
    requests = jobs(4, max_tokens=40)
    plain = texts(answers(make(model, "off"), requests))
    found = {}
    for way in (False, True):
        monkeypatch.setattr(Ways, "on_device", lambda self, requests, way=way: way)
        engine = make(model, folder, max_draft_tokens=5)
        results = answers(engine, requests)
        assert texts(results) == plain
        assert_accounts(engine, results)
        found[way] = engine.stats()
        assert ("launched" in on_device) == way
    assert found[True].acceptance_length > 1.5
    assert found[True].accepted / found[True].verified == pytest.approx(found[False].accepted / found[False].verified, abs=0.08)


def test_how_many_drafts_are_verified_follows_from_older_steps(
    tmp_path: Path, block_target: TargetModel, block_drafters: Path, on_device: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drafter that is right is verified farther than one that is not: by the planner, from what the steps before said."""
    model, checkpoint = follower()
    good = make(model, write(tmp_path / "follower", *checkpoint))
    requests = jobs(4, max_tokens=40)
    asked: list[int] = []
    launch = DecodePipeline.launch
    monkeypatch.setattr(DecodePipeline, "launch", lambda self, drafts: asked.append(drafts) or launch(self, drafts))
    trusted: list[np.ndarray] = []
    trust = DeviceBlocks.trust
    monkeypatch.setattr(DeviceBlocks, "trust", lambda self, rates, *rest: trusted.append(rates) or trust(self, rates, *rest))
    results = answers(good, requests)
    assert_accounts(good, results)
    assert good.stats().acceptance_length > 1.3
    assert good.stats().steps < 40
    of_good = np.mean(asked)
    assert (trusted[0] != trusted[-1]).any(), "what came of drafts changes what later ones are trusted with"
    asked.clear()
    answers(make(block_target, block_drafters / "dspark"), requests)
    assert np.mean(asked[-10:]) < of_good - 1.0
    assert "launched" in on_device


def test_both_ways_are_measured_where_nothing_is_known(
    block_target: TargetModel, block_drafters: Path, on_device: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ways, "on_device", WAY)
    monkeypatch.setattr(ways, "_TRIAL", 4)
    requests = jobs(2, max_tokens=30)
    engine = make(block_target, block_drafters / "dspark")
    results = answers(engine, requests)
    assert texts(results) == texts(answers(make(block_target, "off"), requests))
    assert engine._device is not None
    size = engine._device.ways._of(2)
    assert min(size.inside.steps, size.host.steps) >= 4
    assert min(size.inside.rate, size.host.rate) > 0.0
    assert 5 <= on_device.count("launched") < engine.stats().steps - 4
    assert_accounts(engine, results)
