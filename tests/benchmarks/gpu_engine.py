"""Tokens a second of the engine on a GPU: `python -m tests.benchmarks.gpu_engine [--tiny] [--json] [--out FILE] [--models NAMES]`.

- `decode plain`: steps with state on the device at a fixed context, the batch swept; the best of them is what speculation must beat.
- `decode replayed`: the same with a DSpark-shaped drafter (5 layers, a block of 7, the whole output head, a Markov head of rank 256), whose
  every operation runs. Weights are random, so what would be accepted says nothing: ACCEPTANCE IS REPLAYED, each draft standing by an
  independent coin whose bias gives the stated acceptance length if all 7 are verified. How many are verified a slot is swept as well.
  This drafter stays on the device and reads its context through the paged kernel, inside the captured step (`engine.pipeline`). The
  engine's own (`engine.drafters.dspark`) drafts between steps, from the host, and gathers its context: it is not what these rows measure.
- `decode planned`: a cost model is fitted to these step times, the engine's planner chooses with it how many drafts to verify (0 included),
  and what was measured for that choice is set against the best plain throughput: what never drafting would have given.
- `job`: requests through `Engine.run`, prefill and all, and the same job through transformers' continuous batching.

Rows are written (stderr, and the file named by `--out`) as they are measured, those with goals first.

Models: Qwen3-8B's shapes with random weights, and the packaged SmolLM2-135M. Without a GPU a toy runs through the same code (`--tiny`, then
the default): that shows that the command works, and nothing about speed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kernels
from engine.batch import ForwardBatch, ModelSpec, TargetModel
from engine.checkpoints.loader import build_lean
from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import CudaCapture, DirectCapture, GraphRunner
from engine.kv_pool import KVPool
from engine.models.families import max_positions
from engine.pipeline import DecodePipeline, DeviceState
from engine.speculation.cost_model import CostModel, Load
from engine.speculation.planner import Offer, StepCost, search
from engine.transfer import Arrival
from engine.types import Request, SamplingParams
from kernels.reference.sequential_head import SequentialHead
from tests.benchmarks.gpu_common import describe, device, report
from tests.benchmarks.gpu_peer import Job, Peer, Ran, note

DRAFTS, DRAFT_LAYERS, RANK, BLOCK = 7, 5, 256, 16
SLACK = 8
"""Steps of a slot beside those that are timed."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is run. Batches of decode steps by context; steps timed of each; acceptance lengths, and the drafts a slot that are verified;
    the job; the seconds that its peer may take.
    """

    batches: dict[int, tuple[int, ...]]
    steps: int
    taus: dict[float, tuple[int, ...]]
    job: Job
    peer_seconds: float

    @classmethod
    def of(cls, *, tiny: bool) -> Plan:
        if tiny:
            return cls({24: (1, 2)}, 3, {4.0: (7, 2)}, Job(3, 40, 4, (3,), 64), 100.0)
        batches = {8192: (1, 4, 16, 32, 64), 1024: (1, 16, 64, 256)}
        return cls(batches, 24, {4.0: (7, 3), 2.0: (3, 1)}, Job(256, 512, 128, (64, 32, 256), 2048), 90.0)


class Deadline:
    """`seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._started, self._seconds = time.monotonic(), seconds

    @property
    def passed(self) -> float:
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        return self._seconds - self.passed

    def check(self, needed: float = 0.0) -> None:
        """Raises TimeoutError where `needed` seconds are not left."""
        if self.left < needed:
            raise TimeoutError(f"{self._seconds:g} s are over; --models and --within say what runs and how long")


@dataclass(frozen=True)
class Loaded:
    model: TargetModel
    tokenizer: Any


class NoText:
    """Tokens are all that is counted."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "x" * len(ids)


def qwen3_config(*, tiny: bool, layers: int | None = None) -> Any:
    from transformers import Qwen3Config

    shape = (64, 96, 2, 4, 2, 16, 300) if tiny else (4096, 12288, 36, 32, 8, 128, 151_936)
    hidden, inner, depth, heads, kv_heads, dim, vocab = shape
    return Qwen3Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers or depth, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=dim, vocab_size=vocab, max_position_embeddings=512 if tiny else 16384,
        tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def smollm2_config() -> Any:
    """SmolLM2-135M's shapes."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        vocab_size=49_152, max_position_embeddings=16384, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def config_of(name: str, *, tiny: bool) -> Any:
    """Raises ValueError for a name that is no model of this benchmark."""
    if tiny:
        return qwen3_config(tiny=True)
    if name == "qwen3-8b":
        return qwen3_config(tiny=False)
    if name == "smollm2-135m":
        return smollm2_config()
    raise ValueError(f"{name!r} is not a model of this benchmark: qwen3-8b, smollm2-135m")


def random_model(config: Any, place: torch.device) -> TargetModel:
    """The lean decoder with random weights in the checkpoint's shapes."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    tensors = {name: torch.randn(shape, device=place, dtype=dtype) * 0.02 + (len(shape) == 1) for name, shape in shapes.items()}

    def spec(num_kv_heads: int, head_dim: int, parameters: int) -> ModelSpec:
        return ModelSpec(
            "random", "0", config.num_hidden_layers, num_kv_heads, head_dim, config.hidden_size, config.vocab_size,
            max_positions(config), (), dtype, place, parameters * dtype.itemsize,
        )  # fmt: skip

    return build_lean(tensors, config, spec)


def pool(spec: ModelSpec, blocks: int) -> KVPool:
    """A cache with something in it: zeros would be flattering."""
    made = KVPool(spec.num_layers, blocks, BLOCK, spec.num_kv_heads, spec.head_dim, spec.dtype, spec.device)
    for tensor in (*made.keys, *made.values):
        tensor.normal_()
    return made


class BlockDrafter:
    """Everything that drafting a block of 7 costs: backbone over its own cache, output head, sequential head.

    `coin`: float32 [1], the chance of each draft to stand, as it is replayed; it may be changed between steps.
    """

    def __init__(self, model: TargetModel, kv: KVPool, slots: int, bias: float = 0.5) -> None:
        self._model, self._kv, self._slots = model, kv, slots
        spec = model.spec
        self.coin = torch.full((1,), bias, device=spec.device)
        self._powers = torch.arange(1.0, DRAFTS + 1, device=spec.device)
        rank = RANK if spec.vocab_size > 1000 else 8
        w1, w2 = (torch.randn(spec.vocab_size, rank, device=spec.device, dtype=spec.dtype) * 0.02 for _ in range(2))
        self._head = SequentialHead("vanilla", w1, w2)

    def __call__(self, state: DeviceState) -> tuple[torch.Tensor, torch.Tensor]:
        slots, rows = self._slots, self._slots * DRAFTS
        index = torch.arange(DRAFTS, device=state.last.device)
        position = state.length[:, None] + index
        tokens = torch.where(index == 0, state.last[:, None], 0).view(-1)
        blocks = state.tables.gather(1, position // BLOCK)
        start = torch.arange(0, rows + 1, DRAFTS, device=state.last.device, dtype=torch.int32)
        width = state.tables.shape[1] * BLOCK
        batch = ForwardBatch(
            tokens, position.view(-1), (blocks * BLOCK + position % BLOCK).view(-1), state.tables, start,
            (state.length + DRAFTS).to(torch.int32), torch.arange(rows, device=state.last.device), DRAFTS, width,
        )  # fmt: skip
        base = self._model.forward(batch, self._kv).logits.view(slots, DRAFTS, -1)
        drafts = kernels.sequential_head(base, None, state.last, self._head).tokens
        return drafts, (self.coin**self._powers).expand(slots, DRAFTS)

    def stands(self, stands: torch.Tensor, state: DeviceState) -> torch.Tensor:
        """The replayed verdict."""
        del state
        return torch.rand(stands.shape, device=stands.device) < self.coin


def bias_for(tau: float) -> float:
    """The chance p of each draft that makes 1 + p + ... + p^7 = tau."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**power for power in range(DRAFTS + 1)) < tau else (low, middle)
    return low


@dataclass
class Slots:
    """Steps of one batch at one context; they begin at that context whenever they are run."""

    model: TargetModel
    batch: int
    context: int
    pipeline: DecodePipeline
    drafter: BlockDrafter | None
    begin: list[torch.Tensor] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)
    """Of a step, by drafts a slot."""

    @classmethod
    def of(cls, model: TargetModel, drafter: TargetModel | None, caches: list[KVPool], batch: int, context: int, steps: int) -> Slots:
        """caches: of the model and the drafter, with blocks for `batch` sequences."""
        width, place = blocks_of(context, steps), model.spec.device
        drafts = None if drafter is None else BlockDrafter(drafter, caches[1], batch)
        pipeline = DecodePipeline(
            model, caches[0], slots=batch, width=width, capture=CudaCapture(place) if place.type == "cuda" else DirectCapture(),
            max_drafts=0 if drafts is None else DRAFTS, drafter=drafts, accept=None if drafts is None else drafts.stands,
        )  # fmt: skip
        for slot in range(batch):
            blocks = list(range(1 + slot * width, 1 + (slot + 1) * width))
            pipeline.enter(slot, last=3 + slot, length=context, left=(steps + SLACK) * (DRAFTS + 1), blocks=blocks)
        made = cls(model, batch, context, pipeline, drafts)
        made.begin = [tensor.clone() for tensor in made.state]
        return made

    @property
    def state(self) -> list[torch.Tensor]:
        state = self.pipeline.state
        return [state.last, state.length, state.left, state.made]

    def again(self) -> None:
        for tensor, value in zip(self.state, self.begin, strict=True):
            tensor.copy_(value)

    def measure(self, drafts: int, steps: int, tau: float | None) -> Row:
        """Results are read one step late, as the engine does."""
        if tau is not None:
            assert self.drafter is not None
            self.drafter.coin.fill_(bias_for(tau))
        self.again()
        for _ in range(2):
            self.pipeline.launch(drafts)
        self.pipeline.collect()
        started, made = time.perf_counter(), 0
        for _ in range(steps):
            self.pipeline.launch(drafts)
            made += int(self.pipeline.collect().counts.sum())
        taken = time.perf_counter() - started
        self.pipeline.collect()
        self.seconds[drafts] = taken / steps
        return {
            "run": "decode plain" if tau is None else f"decode replayed, acceptance length {tau:g}",
            "sequences": self.batch,
            "context": self.context,
            "drafts": drafts,
            "tokens/s": made / taken,
            "ms/step": 1e3 * taken / steps,
            "tokens/step": made / steps / self.batch,
        }

    def outside_kernels(self, drafts: int) -> Row:
        """How much of a step is in no kernel: what its kernels take on the device's own clock, against the step's time without a profiler,
        and the gaps in the profiler's own timeline. The longest kernels go to stderr.
        """
        self.again()
        steps = SLACK
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.pipeline.launch(drafts)
            for _ in range(steps - 1):  # one after the other without a pause, as in a run: a device that rests between is faster
                self.pipeline.launch(drafts)
                self.pipeline.collect()
            self.pipeline.collect()
        ran = [(event.self_device_time_total / steps, event.count // steps, event.key) for event in profile.key_averages()]
        for micros, count, name in sorted(ran, reverse=True)[:12]:
            sys.stderr.write(f"{micros:10.0f} us a step, {count:4d} times  {name[:110]}\n")
        events = [event for event in profile.events() or () if event.device_type != torch.autograd.DeviceType.CPU]
        busy, span = union(sorted((event.time_range.start, event.time_range.end) for event in events))
        whole = self.seconds[drafts]
        row = {"run": "step outside kernels", "sequences": self.batch, "context": self.context, "drafts": drafts, "ms/step": 1e3 * whole}
        if not busy:
            return {**row, "note": "the profiler saw no kernel"}
        return {
            **row,
            "kernels a step": len(events) / steps,
            "outside kernels": 1.0 - busy * 1e-6 / steps / whole,
            "gaps while profiled": 1.0 - busy / span,
        }

    def planned(self, tau: float) -> int:
        """Drafts a slot that the engine's planner would verify on such a step, from a cost model fitted to what was measured here."""
        points = []
        for drafts, seconds in self.seconds.items():
            each = drafts + 1
            pairs = self.batch * (each * self.context + each * (each + 1) // 2)
            points.append((Load(self.batch * each, self.batch * each, self.batch * (self.context + each), pairs), seconds))
        model = CostModel(self.batch * (DRAFTS + 1))
        model.profile(points)
        cost = StepCost.of(model, decoding=self.batch, prefill=0, kv_tokens=self.batch * (self.context + 1), drafts=self.batch * DRAFTS)
        survival = np.tile(bias_for(tau) ** np.arange(1.0, DRAFTS + 1), (self.batch, 1))
        return round(int(search(Offer(survival), cost).sum()) / self.batch)


def union(intervals: list[tuple[float, float]]) -> tuple[float, float]:
    """What sorted intervals cover together, and from the first to the last."""
    covered, end = 0.0, float("-inf")
    for start, stop in intervals:
        covered += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return covered, end - intervals[0][0] if intervals else 0.0


def blocks_of(context: int, steps: int) -> int:
    return -(-(context + (steps + SLACK + 1) * (DRAFTS + 1)) // BLOCK)


def caches_for(models: list[TargetModel], batches: tuple[int, ...], context: int, steps: int) -> tuple[list[KVPool], list[int], list[int]]:
    """A cache for each model with room for the largest batch that the memory holds; the batches that fit, and those that do not."""
    per_sequence = blocks_of(context, steps)
    place = models[0].spec.device
    fits = list(batches)
    if place.type == "cuda":
        token = sum(2 * m.spec.num_layers * m.spec.num_kv_heads * m.spec.head_dim * m.spec.dtype.itemsize for m in models)
        free = torch.cuda.mem_get_info(place)[0]
        # Beside the caches: logits of every row of the largest step, in several copies, and the graphs' own memory.
        spare = 4 * max(batches) * (DRAFTS + 1) * models[0].spec.vocab_size * 4 + (4 << 30)
        fits = [batch for batch in batches if batch * per_sequence * BLOCK * token + spare < free]
    caches = [pool(model.spec, max(fits) * per_sequence + 1) for model in models] if fits else []
    return caches, fits, [batch for batch in batches if batch not in fits]


def decode_rows(model: TargetModel, drafter: TargetModel | None, context: int, plan: Plan, until: Deadline) -> Iterator[Row]:
    """Plain steps first, so that the best of them is known. Sizes that the memory does not hold are rows that say so."""
    models = [model] if drafter is None else [model, drafter]
    caches, fits, too_large = caches_for(models, plan.batches[context], context, plan.steps)
    for batch in too_large:
        yield {"run": "decode plain", "sequences": batch, "context": context, "note": "does not fit"}
    made = [Slots.of(model, drafter, caches, batch, context, plan.steps) for batch in fits]
    best = 0.0
    for slots in reversed(made):  # the largest first: it is the likeliest best
        until.check()
        row = slots.measure(0, plan.steps, None)
        best = max(best, row["tokens/s"])
        yield row
    if drafter is None or not made:
        return
    rates: dict[tuple[float, int, int], float] = {
        (tau, slots.batch, 0): slots.batch / slots.seconds[0] for tau in plan.taus for slots in made
    }
    for tau, lengths in plan.taus.items():
        for slots in reversed(made):
            for length in lengths:
                until.check()
                row = slots.measure(length, plan.steps, tau)
                rates[tau, slots.batch, length] = row["tokens/s"]
                yield {**row, "to best plain": row["tokens/s"] / best}
    yield from planned_rows(made, plan, rates, until)
    if model.spec.device.type == "cuda":
        yield from whatever_happens("profile", profiled_rows(made, until))


def profiled_rows(made: list[Slots], until: Deadline) -> Iterator[Row]:
    for slots, length in ((made[-1], 0), (made[0], 0), (made[-1], DRAFTS)):
        until.check()
        yield slots.outside_kernels(length)


def planned_rows(made: list[Slots], plan: Plan, rates: dict[tuple[float, int, int], float], until: Deadline) -> Iterator[Row]:
    """The planner's choices. A number of drafts that was not measured yet for this acceptance length is measured now."""
    plain = max(rate for (_, _, length), rate in rates.items() if length == 0)
    for tau in plan.taus:
        planned = []
        for slots in made:
            length = slots.planned(tau)
            if (tau, slots.batch, length) not in rates:
                until.check()
                rates[tau, slots.batch, length] = slots.measure(length, plan.steps, tau)["tokens/s"]
            rate = rates[tau, slots.batch, length]
            planned.append(rate)
            yield {
                "run": f"decode planned, acceptance length {tau:g}", "sequences": slots.batch, "context": slots.context, "drafts": length,
                "tokens/s": rate, "to best plain": rate / plain, "to plain": rate / rates[tau, slots.batch, 0],
            }  # fmt: skip
        yield {
            "run": f"decode planned, acceptance length {tau:g}, best", "context": made[0].context, "tokens/s": max(planned),
            "to best plain": max(planned) / plain,
        }  # fmt: skip


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
        engine, read, runner = self._engine, Arrival.read, self._engine._runner
        measure = engine._measure

        def measured(work: Any, outcome: Any, generated: int) -> None:
            self.steps.append((work.num_decoding, work.step.num_tokens - work.num_decoding, outcome.nanoseconds * 1e-9))
            measure(work, outcome, generated)

        def timed_read(arrival: Arrival) -> Any:
            started = time.perf_counter()
            found = read(arrival)
            self.waited += time.perf_counter() - started
            return found

        engine._measure = measured  # type: ignore[method-assign]
        Arrival.read = timed_read  # type: ignore[method-assign]
        if isinstance(runner, GraphRunner):
            runner._capture = self._timed(runner._capture)
            eager = runner.eager_steps
        try:
            yield
        finally:
            engine._measure = measure  # type: ignore[method-assign]
            Arrival.read = read  # type: ignore[method-assign]
            if isinstance(runner, GraphRunner):
                runner._capture = runner._capture.capture  # type: ignore[attr-defined]
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


def job_rows(model: TargetModel, plan: Plan, until: Deadline) -> Iterator[Row]:
    """The job through the engine, warm: what is captured and compiled is so in a run before the measured one, with other prompts, for the
    engine keeps the keys and values of those that it has seen.
    """
    job, spec = plan.job, model.spec
    sampling = SamplingParams(job.answer, temperature=0.0, ignore_eos=True)
    token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize
    kv_bytes = job.requests * (job.prompt + job.answer + 2 * BLOCK) * token * 5 // 4
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


def peer_rows(peer: Peer, plan: Plan, ours: float, until: Deadline) -> Iterator[Row]:
    """The same job through transformers' continuous batching, the best setting last."""
    until.check()
    row: Row = {"sequences": plan.job.requests, "context": plan.job.prompt + plan.job.answer}
    name = "job, transformers continuous batching"
    ran: list[Ran] = peer.run(min(plan.peer_seconds, until.left))
    if not ran:
        yield {"run": name, **row, "note": "nothing finished in its time"}
        return
    for one in sorted(ran, key=lambda one: one.rate):
        # Against the most that it can have made.
        least = ours / one.most(plan.job)
        yield {"run": name, **row, "tokens/s": one.rate, "engine to peer": least, "note": note(one, plan.job)}


def load(name: str, place: torch.device, *, tiny: bool) -> tuple[str, TargetModel, TargetModel | None]:
    """(what it is, model, drafter). The packaged model has none; where it cannot be fetched it has random weights, and its name says so."""
    if name == "smollm2-135m" and not tiny:
        from engine.checkpoints import DEFAULT_MODEL, load_model

        try:
            return DEFAULT_MODEL, load_model(DEFAULT_MODEL, device=str(place)).model, None
        except (OSError, ValueError, RuntimeError) as error:
            sys.stderr.write(f"{DEFAULT_MODEL} cannot be fetched ({error}); random weights in its shapes\n")
            return "smollm2-135m shapes", random_model(config_of(name, tiny=tiny), place), None
    drafter = random_model(qwen3_config(tiny=tiny, layers=1 if tiny else DRAFT_LAYERS), place)
    return ("toy shapes" if tiny else name), random_model(config_of(name, tiny=tiny), place), drafter


def model_rows(name: str, plan: Plan, place: torch.device, parts: set[str], until: Deadline, *, tiny: bool) -> Iterator[Row]:
    """parts: of "decode", "job" and "peer"."""
    peer = Peer(name, plan.job, tiny=tiny) if "peer" in parts else None
    try:
        called, model, drafter = load(name, place, tiny=tiny)
        for context in plan.batches if "decode" in parts else ():
            for row in whatever_happens(f"decode at {context}", decode_rows(model, drafter, context, plan, until)):
                yield {"model": called, **row}
            empty(place)
        del drafter
        empty(place)
        ours = 0.0
        for row in whatever_happens("job", job_rows(model, plan, until)) if "job" in parts else ():
            ours = row.get("tokens/s", ours)
            yield {"model": called, **row}
        del model
        empty(place)
        if peer is not None:
            for row in whatever_happens("peer", peer_rows(peer, plan, ours, until)):
                yield {"model": called, **row}
    finally:
        if peer is not None:
            peer.stop()


def whatever_happens(part: str, rows: Iterator[Row]) -> Iterator[Row]:
    """A part that fails is a row, and the next one is run; only time stops everything."""
    try:
        yield from rows
    except TimeoutError:
        raise
    except Exception as error:  # noqa: BLE001
        sys.stderr.write(traceback.format_exc())
        yield {"run": f"{part} failed", "note": f"{type(error).__name__}: {str(error)[:200]}"}


def empty(place: torch.device) -> None:
    """What is not used any more goes back to the device, where another process may need it."""
    import gc

    gc.collect()
    if place.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy shapes; always so without a GPU")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="file for the JSON, besides what is printed")
    parser.add_argument("--within", type=float, default=450.0, help="seconds after which nothing further is begun")
    parser.add_argument("--models", help="comma-separated: qwen3-8b, smollm2-135m")
    parser.add_argument("--configurations", type=Path, help="folder of launch configurations that `tests.benchmarks.kernels --tune` found")
    parser.add_argument("--parts", default="decode,job,peer", help="comma-separated: which of the three")
    options = parser.parse_args()
    until = Deadline(options.within)
    # Where it hangs, if it does; the rows so far are in the file.
    faulthandler.dump_traceback_later(options.within + 20, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        measure(options, until)
    finally:
        faulthandler.cancel_dump_traceback_later()


def measure(options: argparse.Namespace, until: Deadline) -> None:
    place = device()
    tiny = options.tiny or place.type == "cpu"
    torch.manual_seed(0)
    extra: dict[str, Any] = {"acceptance": "replayed from independent coins where a row says so"}
    if options.configurations is not None and place.type == "cuda":
        from kernels.triton import tuning

        extra["tuned launch configurations"] = tuning.load(options.configurations, place)
    names = options.models.split(",") if options.models else ["qwen3-8b"] if tiny else ["qwen3-8b", "smollm2-135m"]
    rows: list[Row] = []
    if tiny:
        extra["sizes"] = "toy: rates mean nothing"

    def add(row: Row) -> None:
        rows.append(row)
        sys.stderr.write(f"{until.passed:6.1f} s  {row}\n")
        if options.out is not None:  # whatever stops the run, what was measured is kept
            unfinished = {"benchmark": "gpu_engine", **describe(place), **extra, "unfinished": True, "rows": rows}
            options.out.write_text(json.dumps(unfinished) + "\n", encoding="utf-8")

    for name in names:
        try:
            for row in model_rows(name, Plan.of(tiny=tiny), place, set(options.parts.split(",")), until, tiny=tiny):
                add(row)
        except TimeoutError as error:
            add({"model": name, "run": f"stopped: {error}"})
    extra["seconds"] = round(until.passed, 1)
    report("gpu_engine", place, rows, extra, as_json=options.json, out=options.out)


if __name__ == "__main__":
    sys.exit(main())
