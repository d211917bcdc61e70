"""The engine's loop on a GPU: steps launched before the ones before them are read, in graphs, with the texts of a CPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import engine as engine_module
from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import GraphRunner
from engine.kv_pool import KVPool
from engine.pipeline import DecodePipeline
from engine.speculation.ways import Ways
from engine.types import FinishReason, Request, Result, SamplingParams
from tests.benchmarks.gpu_models import Loaded, NoText, qwen3_config, random_model
from tests.gpu.requirements import DEVICE, needs_gpu
from tests.unit.engine.context_hash import BLOCK, ContextHash
from tests.unit.engine.drafters.layouts import deepspec, write
from tests.unit.engine.models.tiny import make_hf, make_lean

pytestmark = needs_gpu


def on_gpu(memory: int = 1 << 30, **fields) -> Engine:
    made: list[GraphRunner] = []

    def make_runner(model, kv: KVPool, sequences: int) -> GraphRunner:
        made.append(GraphRunner(model, kv, sequences, memory=memory))
        return made[-1]

    config = {"kv_bytes": 1000 * 8 * BLOCK, "block_size": BLOCK, "max_sequences": 8, "max_step_tokens": 64, "seed": 1}
    with pytest.MonkeyPatch.context() as patched:  # graphs for a model that is no LeanDecoder, for this engine alone
        patched.setattr(engine_module, "make_runner", make_runner)
        engine = Engine(Loaded(ContextHash(DEVICE), NoText()), EngineConfig(**(config | fields)))
    assert (memory > 0) == (made[0].eager_steps == 0)
    return engine


def on_cpu(**fields) -> Engine:
    config = {"kv_bytes": 1000 * 8 * BLOCK, "block_size": BLOCK, "max_sequences": 8, "max_step_tokens": 64, "drafter": "off", "seed": 1}
    config["threads"] = 1  # tests run side by side
    return Engine(Loaded(ContextHash(torch.device("cpu")), NoText()), EngineConfig(**(config | fields)))


def jobs(count: int, **sampling) -> list[Request]:
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 60, 80).tolist()
    made = []
    for number in range(count):
        prompt = shared[: rng.choice([0, 16, 33, 70])] + rng.integers(0, 60, rng.integers(1, 30)).tolist()
        params = SamplingParams(**({"max_tokens": int(rng.integers(1, 50)), "temperature": 0.0} | sampling))
        made.append(Request(str(number), tuple(prompt), params))
    return made


def answers(engine: Engine, requests: list[Request]) -> dict[str, Result]:
    return {result.id: result for result in engine.run(iter(requests))}


@pytest.mark.parametrize("drafter", ["off", "suffix"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 7}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 7}])
def test_texts_are_those_of_a_cpu(drafter: str, sampling: dict) -> None:
    requests = jobs(24, **sampling)
    engine = on_gpu(drafter=drafter)
    found, expected = answers(engine, requests), answers(on_cpu(), requests)
    assert {name: result.token_ids for name, result in found.items()} == {name: result.token_ids for name, result in expected.items()}
    assert FinishReason.STOP in {result.finish_reason for result in found.values()}
    stats = engine.stats()
    assert sum(r.ledger.prefill_ns + r.ledger.decode_ns + r.ledger.draft_ns for r in found.values()) == stats.busy_ns
    assert stats.kv_blocks_held == 0


def test_texts_are_the_same_without_memory_for_graphs_and_under_preemption() -> None:
    requests = jobs(24, ignore_eos=True)
    expected = {name: result.token_ids for name, result in answers(on_cpu(), requests).items()}
    eager = on_gpu(memory=0, drafter="off")
    assert {name: result.token_ids for name, result in answers(eager, requests).items()} == expected
    small = on_gpu(kv_bytes=16 * 8 * BLOCK, drafter="off")
    assert {name: result.token_ids for name, result in answers(small, requests).items()} == expected
    assert small.stats().preemptions > 0


@pytest.mark.parametrize("drafter", ["off", "suffix"])
@pytest.mark.parametrize(
    "sampling", [{"frequency_penalty": 1.5}, {"repetition_penalty": 1.4, "logit_bias": ((5, 2.0), (9, -4.0)), "min_tokens": 1}]
)
def test_rules_and_log_probabilities_are_those_of_a_cpu(drafter: str, sampling: dict) -> None:
    requests = jobs(16, logprobs=2, **sampling)
    found, expected = answers(on_gpu(drafter=drafter), requests), answers(on_cpu(), requests)
    for name, result in expected.items():
        assert found[name].token_ids == result.token_ids
        assert [entry.logprob for entry in found[name].logprobs] == pytest.approx([entry.logprob for entry in result.logprobs], abs=1e-4)


def test_nothing_waits_for_the_device_while_a_step_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = on_gpu(drafter="off")
    rules = {"frequency_penalty": 0.3, "logit_bias": ((5, 2.0),), "min_tokens": 1, "logprobs": 1}
    requests = [*jobs(20, ignore_eos=True, temperature=0.9, top_p=0.9, seed=3), *jobs(20, ignore_eos=True, **rules)]
    requests = [replace(request, id=str(number)) for number, request in enumerate(requests)]
    answers(engine, requests)  # graphs are captured, kernels compiled
    launch, read, events = engine._launcher.launch, engine._booking.book, []

    def watched(work, attempt):
        torch.cuda.set_sync_debug_mode("error")
        try:
            events.append("launch")
            return launch(work, attempt)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine._launcher, "launch", watched)
    monkeypatch.setattr(engine._booking, "book", lambda flight: events.append("read") or read(flight))
    answers(engine, requests)
    ahead = sum(one == other == "launch" for one, other in pairwise(events))
    assert events.count("launch") == events.count("read")
    # Between any two reads there is a launch: the device has the next step before the host looks at the last one.
    assert ahead >= 1
    assert sum(one == other == "read" for one, other in pairwise(events)) <= ahead


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_a_decoder_runs_ahead_on_either_cache(kv_dtype: str) -> None:
    model = random_model(qwen3_config(tiny=True), DEVICE)
    config = EngineConfig(kv_bytes=4 << 20, max_sequences=8, drafter="off", seed=1, kv_dtype=kv_dtype)
    engine = Engine(Loaded(model, NoText()), config)
    assert isinstance(engine._runner, GraphRunner)
    requests = [Request(str(n), tuple(range(3, 40 + n)), SamplingParams(30, temperature=0.0, ignore_eos=True)) for n in range(20)]
    found = answers(engine, requests)
    assert all(len(result.token_ids) == 30 for result in found.values())
    assert engine._runner.eager_steps < engine.stats().steps


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 7, "top_p": 0.9}])
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_drafts_inside_the_steps_leave_the_texts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, sampling: dict) -> None:
    hf = make_hf("qwen3", max_position_embeddings=128)
    folder = write(tmp_path / "drafter", *deepspec(make_lean(hf), kind))
    requests = jobs(7, ignore_eos=True, **sampling)
    model = make_lean(hf, DEVICE)
    monkeypatch.setattr(Ways, "on_device", lambda self, requests: True)
    launched = []
    launch = DecodePipeline.launch
    monkeypatch.setattr(DecodePipeline, "launch", lambda self, drafts: launched.append(drafts) or launch(self, drafts))
    found = {}
    for drafter in ("off", str(folder)):
        engine = Engine(Loaded(model, NoText()), EngineConfig(kv_bytes=8 << 20, max_sequences=8, seed=1, drafter=drafter))
        results = answers(engine, requests)
        found[drafter] = {name: result.token_ids for name, result in results.items()}
        ledgers = [result.ledger for result in results.values()]
        assert all(ledger.drafted == ledger.verified + ledger.pruned for ledger in ledgers)
        assert sum(ledger.prefill_ns + ledger.decode_ns + ledger.draft_ns for ledger in ledgers) == engine.stats().busy_ns
    assert found["off"] == found[str(folder)]
    assert len(launched) > 10
    assert engine.stats().verified > 0
