"""The runner of a GPU, on a CPU: the same code with a call in place of each capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from engine import engine as engine_module
from engine.batch import ForwardOutput, TargetModel
from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import Capture, DirectCapture, Graph, GraphRunner
from engine.kv_pool import KVPool
from engine.runner import Runner, make_runner
from engine.types import Request, SamplingParams
from tests.unit.engine.context_hash import ContextHash
from tests.unit.engine.hash_model import Letters
from tests.unit.engine.models.tiny import make_hf, make_lean


class Loaded:
    def __init__(self) -> None:
        self.model: TargetModel = make_lean(make_hf("llama"))
        self.tokenizer = Letters()


class Counting(DirectCapture):
    """Notes how often something was captured; each capture takes a megabyte."""

    def __init__(self) -> None:
        self.captures = 0
        self.used_bytes = 0

    def __call__(self, call: Callable[[], ForwardOutput]) -> Graph:
        self.captures += 1
        self.used_bytes += 1 << 20
        return super().__call__(call)


def texts(
    loaded: Loaded, drafter: str, runner: Callable[[TargetModel, KVPool, int], Runner], monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[int, ...]]:
    monkeypatch.setattr(engine_module, "make_runner", runner)
    engine = Engine(loaded, EngineConfig(kv_bytes=1 << 20, block_size=4, max_sequences=6, max_step_tokens=32, drafter=drafter, seed=1))
    sampling = [SamplingParams(20, temperature=0.0), SamplingParams(11, temperature=0.8, seed=4), SamplingParams(17, temperature=0.0)]
    requests = [Request(str(n), tuple(range(3, 5 + n % 7)) * 2, sampling[n % 3], drafter=drafter) for n in range(9)]
    return {result.id: result.token_ids for result in engine.run(requests)}


@pytest.mark.parametrize("drafter", ["off", "ngram"])
def test_answers_are_those_of_the_plain_runner(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded()
    plain = texts(loaded, drafter, make_runner, monkeypatch)
    made: list[GraphRunner] = []
    capture = Counting()

    def graphs(model: TargetModel, kv: KVPool, size: int) -> Runner:
        made.append(GraphRunner(model, kv, size, capture, memory=1 << 30))
        return made[-1]

    assert texts(loaded, drafter, graphs, monkeypatch) == plain
    assert made[0].eager_steps == 0
    assert 3 <= capture.captures <= 40


def test_memory_for_graphs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded()
    plain = texts(loaded, "ngram", make_runner, monkeypatch)
    made: list[GraphRunner] = []
    capture = Counting()

    def graphs(model: TargetModel, kv: KVPool, size: int) -> Runner:
        made.append(GraphRunner(model, kv, size, capture, memory=2 << 20))
        return made[-1]

    assert texts(loaded, "ngram", graphs, monkeypatch) == plain
    assert capture.captures == 2
    assert made[0].eager_steps > 0


class Recorded:
    """What `torch.fx` recorded: replayed, it runs the operations of the capture on what its tensors hold now, and no line of Python."""

    used_bytes = 0

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, call: Callable[[], ForwardOutput]) -> Graph:
        self.captures += 1
        return _Recording(make_fx(lambda: call().logits)())


class _Recording:
    def __init__(self, module: torch.fx.GraphModule) -> None:
        self._module = module
        self.output = ForwardOutput(module())

    def replay(self) -> None:
        self.output = ForwardOutput(self._module())


@pytest.mark.parametrize("drafter", ["off", "suffix"])
def test_replays_follow_tables_lengths_and_tokens_that_changed(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that was read while capturing would stay what it was: here nothing is computed anew but what was recorded."""

    def answers() -> tuple[dict[str, tuple[int, ...]], Engine]:
        sizes = {"kv_bytes": 60 * 8 * 16, "block_size": 16, "max_sequences": 6, "max_step_tokens": 48}
        engine = Engine(Hashed(), EngineConfig(**sizes, drafter=drafter, seed=1))
        sampling = [SamplingParams(40, temperature=0.0), SamplingParams(70, temperature=0.9, top_p=0.9, seed=4)]
        requests = [Request(str(n), tuple(range(3, 5 + 9 * n % 40)), sampling[n % 2], drafter=drafter) for n in range(8)]
        return {result.id: result.token_ids for result in engine.run(requests)}, engine

    plain, _ = answers()
    capture = Recorded()
    monkeypatch.setattr(
        engine_module, "make_runner", lambda model, kv, size: GraphRunner(model, kv, size, cast("Capture", capture), memory=1 << 30)
    )
    replayed, engine = answers()
    assert replayed == plain
    assert 3 <= capture.captures < engine.stats().steps  # how many drafts pay, and so how many shapes there are, hangs on the clock


class Hashed:
    def __init__(self) -> None:
        self.model: TargetModel = ContextHash(torch.device("cpu"))
        self.tokenizer = Letters()


def test_a_cpu_gets_the_plain_runner() -> None:
    model = Loaded().model
    kv = KVPool(4, 8, 4, 2, 8, torch.float32, torch.device("cpu"))
    assert type(make_runner(model, kv, 4)) is Runner


def test_launch_configurations_are_chosen_on_steps_that_write_nowhere_but_in_the_spare_block() -> None:
    from engine.profile import tune_attention

    model = make_lean(make_hf("llama"))
    kv = KVPool(4, 40, 4, 2, 8, torch.float32, torch.device("cpu"))
    seen: list[tuple[int, int, int]] = []

    class Watched(Runner):
        def run(self, step, taps=()):  # type: ignore[no-untyped-def]
            raise AssertionError("a runner of captured steps would capture these")

    forward = model.forward

    def watched(batch, pool):  # type: ignore[no-untyped-def]
        seen.append((len(batch.kv_lengths), batch.max_query, batch.max_kv))
        return forward(batch, pool)

    model.forward = watched  # type: ignore[method-assign]
    tune_attention(Watched(model, kv, 8), 100)
    assert [rows for _, rows, _ in seen] == [1, 8, 16]
    for sequences, rows, context in seen:
        assert sequences * (context - rows) <= 39 * 4
        assert sequences * (context - rows) > 39 * 4 - 64, "as much context as there is"
    assert not any(layer[1:].any() for layer in (*kv.keys, *kv.values))
