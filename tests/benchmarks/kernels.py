"""How near each kernel comes to the device's ceilings:
`python -m tests.benchmarks.kernels [--tiny] [--json] [--out FILE] [--untuned] [--within SECONDS]`.

Every row counts the least bytes that must move and the operations that must be done, and gives both rates as fractions of a copy's and a
matrix product's, measured in the same run. Attention goes by (sequences, draft length, context). Launch configurations are measured first,
as an engine does when it loads a model, and reported. All that will be launched is compiled before, by a process a core; then rows that
have a goal are measured first, and each is written (to stderr and to the file) as soon as it is known, so that a run cut short has
what it measured. Without a GPU the kernels run in Triton's
interpreter at tiny size (`--tiny`, then the default): that shows that the command works, and nothing about speed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from kernels.reference.fp8_linear import Fp8Linear
from kernels.reference.sampling import Allowed, Penalties, SampleRows
from kernels.reference.sequential_head import SequentialHead
from kernels.testing import paged_inputs
from tests.benchmarks.gpu_common import ceilings, copies, device, report, save, seconds

GOALS = {
    "attention decode": ("bandwidth", 0.80),
    "attention verify": ("bandwidth", 0.80),
    "attention prefill": ("matrix", 0.60),
    "rms_norm": ("bandwidth", 0.85),
    "add_rms_norm": ("bandwidth", 0.85),
    "gated_activation": ("bandwidth", 0.85),
    "rotary_kv_write": ("bandwidth", 0.85),
    "sequential_head vanilla": ("bandwidth", 1 / 1.3),
}
"""Fraction of which ceiling; attention's at 8k context."""


@dataclass(frozen=True)
class Shapes:
    """Of an 8B-class model (Qwen3-8B), or a toy."""

    heads: int
    kv_heads: int
    dim: int
    hidden: int
    inner: int
    vocab: int
    rank: int
    dtype: torch.dtype

    @classmethod
    def of(cls, *, tiny: bool) -> Shapes:
        if tiny:
            return cls(4, 2, 16, 64, 96, 1500, 16, torch.float32)
        return cls(32, 8, 128, 4096, 12288, 151_936, 256, torch.bfloat16)


Calls = Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Program:
    """What is timed, the least bytes it moves and the operations it does."""

    name: str
    make: Callable[[torch.device], Calls]
    """The same call on different inputs, made on a device."""
    nbytes: int
    flops: int = 0
    where: tuple[int, int, int] | None = None
    """(sequences, draft length, context) of attention."""

    @property
    def goal(self) -> tuple[str, float] | None:
        """Which ceiling, and which fraction of it."""
        deep = self.where is None or self.where[2] >= 8192
        return GOALS.get(self.name.partition(",")[0]) if deep else None

    @property
    def turn(self) -> tuple[int, int, int]:
        """What comes first: rows that have a goal, then long contexts, then most work: configurations are chosen on these."""
        sequences, drafts, context = self.where or (64, 0, 8192)
        return (0 if self.goal else 2 - (context >= 8192), -(drafts // 64 + sequences), drafts)


def programs(shapes: Shapes, *, tiny: bool) -> list[Program]:
    found = [
        *_attention(shapes, tiny=tiny),
        *_rows(shapes, 7 if tiny else 8192),
        *_heads(shapes, 2 if tiny else 16),
        *_vocabulary(shapes, 2 if tiny else 64),
        *_products(shapes, (3,) if tiny else (1, 64, 2048)),
    ]
    return sorted(found, key=lambda program: program.turn)


def _attention(shapes: Shapes, *, tiny: bool) -> Iterator[Program]:
    sizes = [(s, c) for s in (64, 8, 1) for c in (8192, 1024)]
    grid = [("prefill", 1, rows - 1, rows) for rows in (8192, 2048)] + [("prefill", 8, 1023, 1024)]
    grid += [("decode", s, 0, c) for s, c in sizes] + [("verify", s, d, c) for d in (3, 7) for s, c in sizes]
    if tiny:
        grid = [("decode", 2, 0, 40), ("verify", 2, 3, 40), ("prefill", 1, 19, 20)]
    for kind, sequences, drafts, context in grid:
        for fp8 in (False, True) if not tiny else (False,):
            rows = drafts + 1
            width = 1 if fp8 else shapes.dtype.itemsize
            keys = 2 * sequences * context * shapes.kv_heads * shapes.dim * width
            queries = sequences * rows * shapes.heads * shapes.dim * shapes.dtype.itemsize
            pairs = sequences * (rows * context - rows * (rows - 1) // 2)
            yield Program(
                f"attention {kind}{' fp8' if fp8 else ''}",
                partial(_attention_calls, shapes, sequences, rows, context, keys, fp8),
                keys + 2 * queries,
                4 * pairs * shapes.heads * shapes.dim,
                (sequences, drafts, context),
            )


def _attention_calls(shapes: Shapes, sequences: int, rows: int, context: int, keys: int, fp8: bool, place: torch.device) -> Calls:
    from kernels.triton.attention import attention
    from kernels.triton.attention_plan import plan_attention

    calls = []
    for _ in range(copies(keys, place)):
        inputs = paged_inputs(
            [rows] * sequences, [context] * sequences, heads=shapes.heads, kv_heads=shapes.kv_heads, dim=shapes.dim, block_size=16,
            dtype=shapes.dtype, device=place, fp8=fp8,
        )  # fmt: skip
        plan = plan_attention(
            inputs.tables, inputs.query_start, inputs.kv_lengths, torch.zeros(len(inputs.q), dtype=torch.int64, device=place),
            cache=inputs.k_cache, num_heads=shapes.heads, max_query=rows, max_kv=context,
        )  # fmt: skip
        scales = {"k_scale": inputs.k_scale, "v_scale": inputs.v_scale}
        calls.append(partial(attention, inputs.q, inputs.k_cache, inputs.v_cache, plan, shapes.dim**-0.5, **scales))
    return calls


def _rows(shapes: Shapes, rows: int) -> Iterator[Program]:
    from kernels.triton.gated_activation import gated_activation
    from kernels.triton.kv_write import rotary_kv_write
    from kernels.triton.rms_norm import add_rms_norm, rms_norm

    def normal(place: torch.device, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=place).to(shapes.dtype)

    def norm(place: torch.device) -> Calls:
        return [partial(rms_norm, normal(place, rows, shapes.hidden), normal(place, shapes.hidden), 1e-6)]

    def add_norm(place: torch.device) -> Calls:
        x, residual = (normal(place, rows, shapes.hidden) for _ in range(2))
        return [partial(add_rms_norm, x, residual, normal(place, shapes.hidden), 1e-6)]

    def activation(place: torch.device) -> Calls:
        return [partial(gated_activation, normal(place, rows, 2 * shapes.inner), "silu")]

    def rotary(place: torch.device) -> Calls:
        qkv = normal(place, rows, (shapes.heads + 2 * shapes.kv_heads) * shapes.dim)
        angles, weight = normal(place, rows, shapes.dim), normal(place, shapes.dim)
        caches = [torch.zeros(rows // 16 + 1, shapes.kv_heads, 16, shapes.dim, dtype=shapes.dtype, device=place) for _ in range(2)]
        slots = torch.randperm(rows, device=place)
        options: dict[str, Any] = {"num_heads": shapes.heads, "q_norm": weight, "k_norm": weight, "eps": 1e-6}
        return [partial(rotary_kv_write, qkv, angles, angles, slots, *caches, **options)]

    width = rows * shapes.dtype.itemsize
    yield Program("rms_norm", norm, 2 * width * shapes.hidden)
    yield Program("add_rms_norm", add_norm, 4 * width * shapes.hidden)
    yield Program("rotary_kv_write", rotary, 2 * width * (shapes.heads + 2 * shapes.kv_heads + 1) * shapes.dim)
    yield Program("gated_activation", activation, 3 * width * shapes.inner)


def _vocabulary(shapes: Shapes, rows: int) -> Iterator[Program]:
    from kernels.triton.sampling import token_log_probs

    nbytes, words = rows * shapes.vocab * 4, -(-shapes.vocab // 32)
    kinds: list[tuple[str, int, int, float, str, int]] = [
        ("greedy", 0, 0, 1.0, "", 0),
        ("greedy, penalties", 0, 0, 1.0, "penalties", nbytes + rows * words * 4),
        ("greedy, mask", 0, 0, 1.0, "allowed", rows * words * 4),
        ("temperature", 2, 0, 1.0, "", 0),
        ("top-k 50", 2, 50, 1.0, "", 0),
        ("top-p 0.9", 2, 0, 0.9, "", 0),
    ]
    for name, mode, top_k, top_p, rule, more in kinds:
        make = partial(_verify_calls, shapes.vocab, rows, nbytes, mode, top_k, top_p, rule)
        yield Program(f"verify {name}", make, nbytes + more)

    def log_probs(place: torch.device) -> Calls:
        lines, tokens = torch.arange(rows, device=place), torch.randint(0, shapes.vocab, (rows,), device=place)
        every = [3 * torch.randn(rows, shapes.vocab, device=place) for _ in range(copies(nbytes, place))]
        return [partial(token_log_probs, logits, lines, tokens, 5) for logits in every]

    yield Program("token_log_probs 5", log_probs, nbytes)


def _verify_calls(vocab: int, rows: int, nbytes: int, mode: int, top_k: int, top_p: float, rule: str, place: torch.device) -> Calls:
    from kernels.triton.sampling import verify

    rules: dict[str, Any] = {}
    if rule:
        lines = torch.arange(rows, dtype=torch.int32, device=place)
        bits = torch.randint(-(2**31), 2**31, (rows, -(-vocab // 32)), device=place).to(torch.int32)
        if rule == "allowed":
            rules["allowed"] = Allowed(bits, lines)
        else:
            counts = torch.randint(0, 2, (rows, vocab), dtype=torch.int32, device=place)
            half = torch.full((rows,), 0.5, device=place)
            rules["penalties"] = Penalties(counts, bits, lines, half, half, 1 + half, torch.zeros(rows, dtype=torch.int32, device=place))
    drafts = torch.randint(0, vocab, (rows,), device=place)
    what = SampleRows(
        torch.full((rows,), mode, dtype=torch.int32, device=place),
        torch.ones(rows, device=place),
        torch.full((rows,), top_k, dtype=torch.int32, device=place),
        torch.full((rows,), top_p, device=place),
        drafts,
        drafts,
        drafts,
    )
    attempt = torch.zeros(1, dtype=torch.int64, device=place)
    every = [3 * torch.randn(rows, vocab, device=place) for _ in range(copies(nbytes, place))]
    return [partial(verify, logits, what, attempt, **rules) for logits in every]


def _heads(shapes: Shapes, sequences: int) -> Iterator[Program]:
    """The byte floor of a block: W2 once and the base logits once, for each of its 7 positions."""
    length = 2 if shapes.vocab < 5000 else 7
    for vocab in (shapes.vocab,) if length == 2 else (shapes.vocab, 262_144, 32_000):
        name = "sequential_head vanilla" if vocab == shapes.vocab else f"sequential_head vanilla, vocabulary {vocab}"
        nbytes = length * (vocab * shapes.rank + sequences * vocab) * shapes.dtype.itemsize
        make = partial(_head_calls, shapes, sequences, length, vocab)
        yield Program(name, make, nbytes, 2 * sequences * length * vocab * shapes.rank)


def _head_calls(shapes: Shapes, sequences: int, length: int, vocab: int, place: torch.device) -> Calls:
    from kernels.triton.sequential_head import sequential_head

    w1, w2 = (torch.randn(vocab, shapes.rank, device=place).to(shapes.dtype) for _ in range(2))
    logits = torch.randn(sequences, length, vocab, device=place).to(shapes.dtype)
    anchors = torch.randint(0, vocab, (sequences,), device=place)
    return [partial(sequential_head, logits, None, anchors, SequentialHead("vanilla", w1, w2))]


def _products(shapes: Shapes, all_rows: tuple[int, ...]) -> Iterator[Program]:
    size = shapes.hidden
    for rows in all_rows:
        nbytes = size * size + 2 * rows * size * shapes.dtype.itemsize
        yield Program(f"fp8_linear {rows} rows", partial(_product_calls, shapes, rows, nbytes), nbytes, 2 * rows * size * size)


def _product_calls(shapes: Shapes, rows: int, nbytes: int, place: torch.device) -> Calls:
    from kernels.triton.fp8_linear import fp8_linear

    size = shapes.hidden
    block = (128, 128) if size % 128 == 0 else (size, size)
    calls = []
    for _ in range(copies(nbytes, place)):
        weight = torch.randn(size, size, device=place).to(torch.float8_e4m3fn)
        packed = Fp8Linear(weight, torch.ones(-(-size // block[0]), -(-size // block[1]), device=place), block)
        calls.append(partial(fp8_linear, torch.randn(rows, size, device=place).to(shapes.dtype), packed))
    return calls


def measure(program: Program, place: torch.device, ceiling: dict[str, float]) -> dict[str, Any]:
    taken = seconds(program.make(place), place)
    sequences, drafts, context = program.where or (None, None, None)
    shares = {"bandwidth": program.nbytes / taken / ceiling["bytes_per_s"], "matrix": program.flops / taken / ceiling["flops_per_s"]}
    kind, goal = (program.goal if place.type == "cuda" else None) or (None, 0.0)
    return {
        "kernel": program.name,
        "sequences": sequences,
        "drafts": drafts,
        "context": context,
        "us": taken * 1e6,
        "GB/s": program.nbytes / taken * 1e-9,
        "of copy": shares["bandwidth"],
        "TFLOP/s": program.flops / taken * 1e-12,
        "of matmul": shares["matrix"],
        "goal": None if kind is None else f"{'pass' if shares[kind] >= goal else 'MISS'} {goal:.2f} {kind}",
    }


def compile_all(wanted: Sequence[Program], place: torch.device, *, tuned: bool, limit: float) -> int:
    """Compiles what the programs launch, all candidates where they are to be tuned, by a process a core. Returns how many launches."""
    from kernels.triton import tuning
    from kernels.triton.ahead import compile_in_parallel

    def walk() -> None:
        nowhere = torch.device("meta")
        with tuning.every_candidate() if tuned else contextlib.nullcontext():
            for program in wanted:
                program.make(nowhere)[0]()

    return compile_in_parallel(walk, place, limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy shapes; always so without a GPU")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="file for the JSON, besides what is printed; rewritten with every row")
    parser.add_argument("--only", default="", help="kernels whose name contains one of these, separated by commas")
    parser.add_argument("--goals", action="store_true", help="rows that have a goal alone")
    parser.add_argument("--untuned", action="store_true", help="run each kernel's first launch configuration")
    parser.add_argument("--tune", type=Path, help="folder of launch configurations: those in it are taken up, new ones are kept there")
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds after which no row is begun; what is left out is named")
    options = parser.parse_args()
    started = time.monotonic()
    place = device()
    tiny = options.tiny or place.type == "cpu"
    from kernels.triton import tuning

    def say(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - started:6.1f} s  {text}\n")
        sys.stderr.flush()

    wanted = [
        program
        for program in programs(Shapes.of(tiny=tiny), tiny=tiny)
        if any(part in program.name for part in options.only.split(",")) and (program.goal or not options.goals)
    ]
    if place.type == "cuda":
        torch.cuda.init()
        say(f"{len(wanted)} rows on {torch.cuda.get_device_name(place)}")
        count = compile_all(wanted, place, tuned=not options.untuned, limit=min(options.within / 2, 120.0))
        say(f"{count} launches compiled by {len(os.sched_getaffinity(0))} processes")
    torch.manual_seed(0)
    ceiling = ceilings(place)
    extra: dict[str, Any] = {
        "copy GB/s": round(ceiling["bytes_per_s"] * 1e-9, 1),
        "matmul TFLOP/s": round(ceiling["flops_per_s"] * 1e-12, 2),
        "kernels": "Triton" if place.type == "cuda" else "Triton's interpreter, tiny shapes: rates mean nothing",
    }
    say(f"copy {extra['copy GB/s']} GB/s, matrix product {extra['matmul TFLOP/s']} TFLOP/s")
    rows: list[dict[str, Any]] = []
    left_out = []
    with contextlib.ExitStack() as stack:
        if not options.untuned:
            folder = options.tune or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            tuning.load(folder, place)
            stack.enter_context(tuning.tuning(folder, compiled=True))
        for program in wanted:
            if time.monotonic() - started > options.within:
                left_out.append(" ".join(map(str, (program.name, *(program.where or ())))))
                continue
            rows.append(measure(program, place, ceiling))
            row = rows[-1]
            where = "/".join(str(number) for number in program.where or ())
            say(
                f"{row['kernel']:28} {where:12} {row['us']:9.1f} us  {row['of copy']:.3f} of copy  {row['of matmul']:.3f} of matmul"
                f"  {row['goal'] or ''}"
            )
            if found := tuning.found(place):
                extra["launch configurations"] = "; ".join(f"{key}: {config}" for key, config in sorted(found.items()))
            save("kernels", place, rows, extra, options.out)
    if left_out:
        extra["not measured in time"] = "; ".join(left_out)
    report("kernels", place, rows, extra, as_json=options.json, out=options.out)


if __name__ == "__main__":
    sys.exit(main())
