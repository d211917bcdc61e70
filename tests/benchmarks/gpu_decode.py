"""Decode steps of the GPU engine benchmark: the device's loop alone, at a fixed context.

- `decode plain`: steps with state on the device at a fixed context, the batch swept; the best of them is what speculation must beat.
- `decode replayed`: the same with a DSpark-shaped drafter (5 layers, a block of 7, the whole output head, a Markov head of rank 256), whose
  every operation runs. Weights are random, so what would be accepted says nothing: ACCEPTANCE IS REPLAYED, each draft standing by an
  independent coin whose bias gives the stated acceptance length if all 7 are verified. How many are verified a slot is swept as well.
  This drafter stays on the device and reads its context through the paged kernel, inside the captured step (`engine.pipeline`), as the
  engine's own does (`engine.drafters.parts.on_device`); that one also takes the target's hidden states in, which these rows leave out.
- `decode planned`: a cost model is fitted to these step times, the engine's planner chooses with it how many drafts to verify (0 included),
  and what was measured for that choice is set against the best plain throughput: what never drafting would have given.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

import kernels
from engine.batch import ForwardBatch, ModelSpec, TargetModel
from engine.graphs import CudaCapture, DirectCapture
from engine.kv_pool import KVPool
from engine.pipeline import DecodePipeline, DeviceDrafts, DeviceState
from engine.speculation.cost_model import CostModel, Load
from engine.speculation.planner import Offer, StepCost, search
from kernels.reference.sequential_head import SequentialHead
from tests.benchmarks.gpu_common import Deadline, Row, whatever_happens

DRAFTS, RANK, BLOCK = 7, 256, 16
SLACK = 8
"""Steps of a slot beside those that are timed."""


@dataclass(frozen=True)
class Steps:
    """What is run. Batches of decode steps by context; steps timed of each; acceptance lengths, and the drafts a slot that are verified."""

    batches: dict[int, tuple[int, ...]]
    timed: int
    taus: dict[float, tuple[int, ...]]

    @classmethod
    def of(cls, *, tiny: bool) -> Steps:
        if tiny:
            return cls({24: (1, 2)}, 3, {4.0: (7, 2)})
        return cls({8192: (1, 4, 16, 32, 64), 1024: (1, 16, 64, 256)}, 24, {4.0: (7, 3), 2.0: (3, 1)})


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

    def __call__(self, state: DeviceState) -> DeviceDrafts:
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
        return DeviceDrafts(drafts, (self.coin**self._powers).expand(slots, DRAFTS))

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


def decode_rows(model: TargetModel, drafter: TargetModel | None, context: int, plan: Steps, until: Deadline) -> Iterator[Row]:
    """Plain steps first, so that the best of them is known. Sizes that the memory does not hold are rows that say so."""
    models = [model] if drafter is None else [model, drafter]
    caches, fits, too_large = caches_for(models, plan.batches[context], context, plan.timed)
    for batch in too_large:
        yield {"run": "decode plain", "sequences": batch, "context": context, "note": "does not fit"}
    made = [Slots.of(model, drafter, caches, batch, context, plan.timed) for batch in fits]
    best = 0.0
    for slots in reversed(made):  # the largest first: it is the likeliest best
        until.check()
        row = slots.measure(0, plan.timed, None)
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
                row = slots.measure(length, plan.timed, tau)
                rates[tau, slots.batch, length] = row["tokens/s"]
                yield {**row, "to best plain": row["tokens/s"] / best}
    yield from planned_rows(made, plan, rates, until)
    if model.spec.device.type == "cuda":
        yield from whatever_happens("profile", profiled_rows(made, until))


def profiled_rows(made: list[Slots], until: Deadline) -> Iterator[Row]:
    for slots, length in ((made[-1], 0), (made[0], 0), (made[-1], DRAFTS)):
        until.check()
        yield slots.outside_kernels(length)


def planned_rows(made: list[Slots], plan: Steps, rates: dict[tuple[float, int, int], float], until: Deadline) -> Iterator[Row]:
    """The planner's choices. A number of drafts that was not measured yet for this acceptance length is measured now."""
    plain = max(rate for (_, _, length), rate in rates.items() if length == 0)
    for tau in plan.taus:
        planned = []
        for slots in made:
            length = slots.planned(tau)
            if (tau, slots.batch, length) not in rates:
                until.check()
                rates[tau, slots.batch, length] = slots.measure(length, plan.timed, tau)["tokens/s"]
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
