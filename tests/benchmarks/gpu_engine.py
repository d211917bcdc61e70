"""Tokens a second of the engine on a GPU: `python -m tests.benchmarks.gpu_engine [--tiny] [--json] [--out FILE] [--models NAMES]`.

- `job`: requests through `Engine.run`, prefill and all, and the same job through transformers' continuous batching.
- `decode plain`: steps with state on the device at a fixed context, the batch swept; the best of them is what speculation must beat.
- `decode replayed`: the same with a DSpark-shaped drafter (5 layers, a block of 7, the whole output head, a Markov head of rank 256), whose
  every operation runs. Weights are random, so what would be accepted says nothing: ACCEPTANCE IS REPLAYED, each draft standing by an
  independent coin whose bias gives the stated acceptance length if all 7 are verified. How many are verified a slot is swept as well.

Models: Qwen3-8B's shapes with random weights, and the packaged SmolLM2-135M. Without a GPU a toy runs through the same code (`--tiny`, then
the default): that shows that the command works, and nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kernels
from engine.batch import ForwardBatch, ModelSpec, TargetModel
from engine.checkpoints.loader import build_lean
from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import CudaCapture, DirectCapture
from engine.kv_pool import KVPool
from engine.models.families import max_positions
from engine.pipeline import DecodePipeline, DeviceState
from engine.types import Request, SamplingParams
from kernels.reference.sequential_head import SequentialHead
from tests.benchmarks.gpu_common import device, report

DRAFTS, DRAFT_LAYERS, RANK, BLOCK = 7, 5, 256, 16
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is run. Batches of decode steps by context; the job's requests, prompt and answer tokens; acceptance lengths."""

    batches: dict[int, tuple[int, ...]]
    steps: int
    requests: int
    prompt: int
    answer: int
    taus: dict[float, tuple[int, ...]]
    """Drafts a slot that are verified, by acceptance length."""

    @classmethod
    def of(cls, *, tiny: bool) -> Plan:
        if tiny:
            return cls({24: (1, 2)}, 3, 3, 12, 4, {4.0: (7, 2)})
        return cls({8192: (1, 4, 16, 32), 1024: (1, 8, 32, 128, 256)}, 30, 256, 512, 128, {4.0: (7, 3), 2.0: (3, 1)})


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
    """Everything that drafting a block of 7 costs: backbone over its own cache, output head, sequential head."""

    def __init__(self, model: TargetModel, kv: KVPool, slots: int, bias: float = 0.5) -> None:
        """bias: the chance of each draft to stand, as it is replayed."""
        self._model, self._kv, self._slots = model, kv, slots
        spec = model.spec
        self._survival = (bias ** torch.arange(1.0, DRAFTS + 1, device=spec.device)).expand(slots, DRAFTS)
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
        return drafts, self._survival


def bias_for(tau: float) -> float:
    """The chance p of each draft that makes 1 + p + ... + p^7 = tau."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**power for power in range(DRAFTS + 1)) < tau else (low, middle)
    return low


def decode(
    model: TargetModel, drafter: TargetModel | None, batch: int, context: int, steps: int, tau: float | None, lengths: tuple[int, ...]
) -> Iterator[Row]:
    """Steps of `batch` sequences at `context` tokens, results read one step late; a row for each number of drafts in `lengths`."""
    each = (steps + 9) * (DRAFTS + 1) * len(lengths)
    width = -(-(context + each) // BLOCK) + 1
    kv = pool(model.spec, batch * width + 1)
    place = model.spec.device
    coin = 0.0 if tau is None else bias_for(tau)
    pipeline = DecodePipeline(
        model, kv, slots=batch, width=width, capture=CudaCapture(place) if place.type == "cuda" else DirectCapture(),
        max_drafts=DRAFTS if drafter is not None else 0,
        drafter=None if drafter is None else BlockDrafter(drafter, pool(drafter.spec, batch * width + 1), batch, coin),
        accept=None if tau is None else lambda stands, state: torch.rand(stands.shape, device=stands.device) < coin,
    )  # fmt: skip
    for length in lengths:
        for slot in range(batch):
            blocks = list(range(1 + slot * width, 1 + (slot + 1) * width))
            pipeline.enter(slot, last=3 + slot, length=context, left=(steps + 8) * (DRAFTS + 1), blocks=blocks)
        for _ in range(2):
            pipeline.launch(length)
        pipeline.collect()
        started, made = time.perf_counter(), 0
        for _ in range(steps):
            pipeline.launch(length)
            made += int(pipeline.collect().counts.sum())
        pipeline.collect()
        taken = time.perf_counter() - started
        busy = kernel_seconds(pipeline, length, place)
        yield {
            "run": "decode plain" if tau is None else f"decode replayed, acceptance length {tau:g}",
            "sequences": batch,
            "drafts": length,
            "context": context,
            "tokens/s": made / taken,
            "ms/step": 1e3 * taken / steps,
            "tokens/step": made / steps / batch,
            "outside kernels": None if busy is None else 1.0 - busy * steps / taken,
        }


def kernel_seconds(pipeline: DecodePipeline, drafts: int, place: torch.device) -> float | None:
    """Of a step: what its kernels take, added up, by the device's own clock; None without a GPU. The longest go to stderr."""
    if place.type != "cuda":
        return None
    steps = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            pipeline.launch(drafts)
            pipeline.collect()
    kernels_run = [(event.self_device_time_total / steps, event.count // steps, event.key) for event in profile.key_averages()]
    for micros, count, name in sorted(kernels_run, reverse=True)[:12]:
        sys.stderr.write(f"{micros:10.0f} us a step, {count:4d} times  {name[:110]}\n")
    return sum(micros for micros, _, _ in kernels_run) * 1e-6


def decode_rows(model: TargetModel, drafter: TargetModel | None, plan: Plan) -> Iterator[Row]:
    """Sizes that the memory does not hold are rows that say so."""
    for context, batches in plan.batches.items():
        best = 0.0
        for tau, lengths in ((None, (0,)), *(plan.taus.items() if drafter is not None else ())):
            for batch in batches:
                name = "decode plain" if tau is None else f"decode replayed, acceptance length {tau:g}"
                try:
                    for row in decode(model, None if tau is None else drafter, batch, context, plan.steps, tau, lengths):
                        best = max(best, row["tokens/s"]) if tau is None else best
                        yield row if tau is None else {**row, "to best plain": row["tokens/s"] / best}
                except torch.OutOfMemoryError:
                    yield {"run": name, "sequences": batch, "context": context, "note": "does not fit"}


def job_rows(model: TargetModel, hf: Any, plan: Plan) -> Iterator[Row]:
    """The engine, and transformers' continuous batching on the same weights' shapes and the same prompts."""
    vocab = model.spec.vocab_size
    prompts = torch.randint(3, vocab, (plan.requests, plan.prompt), generator=torch.Generator().manual_seed(1)).tolist()
    sampling = SamplingParams(plan.answer, temperature=0.0, ignore_eos=True)
    engine = Engine(Loaded(model, NoText()), EngineConfig(kv_bytes=4 << 20 if vocab < 1000 else 20 << 30, drafter="off"))  # type: ignore[arg-type]
    for measured in (False, True):  # the first run captures and compiles
        requests = [Request(str(number), tuple(prompt), sampling) for number, prompt in enumerate(prompts)]
        started = time.perf_counter()
        made = sum(len(result.token_ids) for result in engine.run(requests))
        taken = time.perf_counter() - started
        if measured:
            yield {"run": "job, engine", "sequences": plan.requests, "context": plan.prompt + plan.answer, "tokens/s": made / taken}
    ours = made / taken
    del engine
    row: Row = {"run": "job, transformers continuous batching", "sequences": plan.requests, "context": plan.prompt + plan.answer}
    try:
        from transformers import GenerationConfig

        wanted = GenerationConfig(max_new_tokens=plan.answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
        hf.generate_batch(prompts[:2], generation_config=wanted)
        started = time.perf_counter()
        made = sum(len(output.generated_tokens) for output in hf.generate_batch(prompts, generation_config=wanted).values())
        rate = made / (time.perf_counter() - started)
        yield {**row, "tokens/s": rate, "to best plain": None, "note": f"engine / transformers = {ours / rate:.2f}"}
    except Exception as error:  # noqa: BLE001 - a peer that cannot run here is a row, not a failure
        yield {**row, "note": f"did not run: {type(error).__name__}: {str(error)[:80]}"}


def smollm2(place: torch.device, dtype: torch.dtype) -> tuple[TargetModel, Any, str]:
    """The packaged model, or where it cannot be fetched random weights in its shapes, which the name then says."""
    from transformers import AutoModelForCausalLM

    from engine.checkpoints import DEFAULT_MODEL, fetch, load_model

    try:
        directory = fetch(DEFAULT_MODEL).directory
    except (OSError, ValueError, RuntimeError) as error:
        sys.stderr.write(f"{DEFAULT_MODEL} cannot be fetched ({error}); random weights in its shapes\n")
        with torch.device(place):
            hf = AutoModelForCausalLM.from_config(smollm2_config(), dtype=dtype).eval()
        return random_model(smollm2_config(), place), hf, "smollm2-135m shapes"
    hf = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(place).eval()
    return load_model(DEFAULT_MODEL, device=str(place)).model, hf, DEFAULT_MODEL


def all_rows(names: list[str], plan: Plan, place: torch.device, *, tiny: bool) -> Iterator[Row]:
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    for name in names:
        if name == "smollm2-135m":
            model, hf, name = smollm2(place, dtype)
            drafter = None
        else:
            config = qwen3_config(tiny=tiny)
            model, drafter = random_model(config, place), random_model(qwen3_config(tiny=tiny, layers=1 if tiny else DRAFT_LAYERS), place)
            with torch.device(place):
                hf = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for row in job_rows(model, hf, plan):
            yield {"model": name, **row}
        hf = None  # its weights make room for caches
        if place.type == "cuda":
            torch.cuda.empty_cache()
        for row in decode_rows(model, drafter, plan):
            yield {"model": name, **row}
        del model, drafter
        if place.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy shapes; always so without a GPU")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="file for the JSON, besides what is printed")
    parser.add_argument("--within", type=float, default=450.0, help="seconds after which no further row is begun")
    parser.add_argument("--models", help="comma-separated: qwen3-8b, smollm2-135m")
    options = parser.parse_args()
    place = device()
    tiny = options.tiny or place.type == "cpu"
    torch.manual_seed(0)
    names = options.models.split(",") if options.models else ["qwen3-toy"] if tiny else ["qwen3-8b", "smollm2-135m"]
    started = time.monotonic()
    rows: list[Row] = []
    for row in all_rows(names, Plan.of(tiny=tiny), place, tiny=tiny):
        rows.append(row)
        sys.stderr.write(f"{time.monotonic() - started:6.1f} s  {row}\n")
        if options.out is not None:  # whatever stops the run, what was measured is kept
            options.out.write_text(json.dumps({"benchmark": "gpu_engine", "unfinished": True, "rows": rows}) + "\n", encoding="utf-8")
        if time.monotonic() - started > options.within:
            rows.append({"model": "all", "run": f"stopped: {options.within} s are over; --models and --within say what runs and how long"})
            break
    extra = {"acceptance": "replayed from independent coins where a row says so", "seconds": round(time.monotonic() - started, 1)}
    if tiny:
        extra["sizes"] = "toy: rates mean nothing"
    report("gpu_engine", place, rows, extra, as_json=options.json, out=options.out)


if __name__ == "__main__":
    sys.exit(main())
