"""A whole job of the GPU engine benchmark: requests through `Engine.run`, prefill and all, and the same through transformers' continuous
batching.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine.batch import TargetModel
from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import GraphRunner
from engine.transfer import Arrival
from engine.types import Request, SamplingParams
from tests.benchmarks.gpu_common import Deadline, Row
from tests.benchmarks.gpu_models import Loaded, NoText
from tests.benchmarks.gpu_peer import Job, Peer, Ran, note

PEER_SECONDS = 90.0
"""That its settings may take together, loading the model included."""


def job_of(*, tiny: bool) -> Job:
    return Job(3, 40, 4, (3,), 64) if tiny else Job(256, 512, 128, (64, 32, 256), 2048)


class Watch:
    """Where the time of a run goes: by step on the device's clock, and on the host's how long it waited for results and captured graphs."""

    def __init__(self, engine: Engine) -> None:
        self.steps: list[tuple[int, int, float]] = []
        """(rows that decode, tokens of prompts, seconds) of each."""
        self.waited = self.captured = 0.0
        self.graphs = self.eager = 0
        self._engine = engine

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        booking, read, runner = self._engine._booking, Arrival.read, self._engine._runner
        measure = booking._measure

        def measured(work: Any, outcome: Any, generated: int) -> None:
            self.steps.append((work.num_decoding, work.step.num_tokens - work.num_decoding, outcome.nanoseconds * 1e-9))
            measure(work, outcome, generated)

        def timed_read(arrival: Arrival) -> Any:
            started = time.perf_counter()
            found = read(arrival)
            self.waited += time.perf_counter() - started
            return found

        booking._measure = measured  # type: ignore[method-assign]
        Arrival.read = timed_read  # type: ignore[method-assign]
        if isinstance(runner, GraphRunner):
            runner.capture = self._timed(runner.capture)
            eager = runner.eager_steps
        try:
            yield
        finally:
            booking._measure = measure  # type: ignore[method-assign]
            Arrival.read = read  # type: ignore[method-assign]
            if isinstance(runner, GraphRunner):
                runner.capture = runner.capture.capture  # type: ignore[attr-defined]
                self.eager = runner.eager_steps - eager

    def _timed(self, capture: Any) -> Any:
        watch = self

        class Timed:
            def __init__(self) -> None:
                self.capture = capture

            @property
            def used_bytes(self) -> int:
                return int(capture.used_bytes)

            def __call__(self, call: Callable[[], Any]) -> Any:
                started = time.perf_counter()
                graph = capture(call)
                watch.captured += time.perf_counter() - started
                watch.graphs += 1
                return graph

        return Timed()

    def row(self, taken: float) -> Row:
        """What is left of the whole, after the device's time, was spent with the device idle."""
        prefill = [step for step in self.steps if step[1]]
        decode = [step for step in self.steps if not step[1]]
        busy = sum(seconds for _, _, seconds in self.steps)
        prompt_seconds, decode_seconds = (sum(step[2] for step in steps) for steps in (prefill, decode))
        return {
            "seconds": taken, "steps with prompts": len(prefill), "prompt tokens": sum(step[1] for step in prefill),
            "seconds with prompts": prompt_seconds, "decode steps": len(decode),
            "mean rows": sum(step[0] for step in decode) / max(len(decode), 1), "ms/step": 1e3 * decode_seconds / max(len(decode), 1),
            "device idle": taken - busy, "host waited": self.waited, "graphs captured": self.graphs, "seconds capturing": self.captured,
            "eager steps": self.eager,
        }  # fmt: skip


def job_rows(model: TargetModel, job: Job, until: Deadline) -> Iterator[Row]:
    """The job through the engine, warm: what is captured and compiled is so in a run before the measured one, with other prompts, for the
    engine keeps the keys and values of those that it has seen.
    """
    spec = model.spec
    sampling = SamplingParams(job.answer, temperature=0.0, ignore_eos=True)
    token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize
    kv_bytes = job.requests * (job.prompt + job.answer + 2 * EngineConfig().block_size) * token * 5 // 4
    engine = Engine(Loaded(model, NoText()), EngineConfig(kv_bytes=kv_bytes, drafter="off"))  # type: ignore[arg-type]
    for seed, run in enumerate(("first run", "job, engine")):
        watch = Watch(engine)
        prompts = torch.randint(3, spec.vocab_size, (job.requests, job.prompt), generator=torch.Generator().manual_seed(seed)).tolist()
        requests = [Request(str(number), tuple(prompt), sampling) for number, prompt in enumerate(prompts)]
        started, made = time.perf_counter(), 0
        with watch():
            for result in engine.run(requests):
                made += len(result.token_ids)
                until.check()
        taken = time.perf_counter() - started
        sizes = {"sequences": job.requests, "context": job.prompt + job.answer}
        computed = sum(prompt for _, prompt, _ in watch.steps)
        if computed < job.requests * job.prompt:
            raise RuntimeError(f"{computed} of {job.requests * job.prompt} prompt tokens were computed: this is not the whole job")
        if run == "job, engine":
            yield {"run": run, **sizes, "tokens/s": made / taken}
        yield {"run": f"{run}: where its time goes", **sizes, "tokens/s": made / taken, **watch.row(taken)}


def peer_rows(peer: Peer, job: Job, ours: float, until: Deadline) -> Iterator[Row]:
    """The same job through transformers' continuous batching, the best setting last."""
    until.check()
    row: Row = {"sequences": job.requests, "context": job.prompt + job.answer}
    name = "job, transformers continuous batching"
    ran: list[Ran] = peer.run(min(PEER_SECONDS, until.left))
    if not ran:
        yield {"run": name, **row, "note": "nothing finished in its time"}
        return
    for one in sorted(ran, key=lambda one: one.rate):
        # Against the most that it can have made.
        least = ours / one.most(job)
        yield {"run": name, **row, "tokens/s": one.rate, "engine to peer": least, "note": note(one, job)}
