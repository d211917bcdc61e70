"""How near each kernel comes to the device's ceilings: `python -m tests.benchmarks.kernels [--tiny] [--json] [--out FILE] [--untuned]`.

Every row counts the least bytes that must move and the operations that must be done, and gives both rates as fractions of a copy's and a
matrix product's, measured in the same run. Attention goes by (sequences, draft length, context). Launch configurations are measured first,
as an engine does when it loads a model, and reported. Without a GPU the kernels run in Triton's
interpreter at tiny size (`--tiny`, then the default): that shows that the command works, and nothing about speed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
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
from tests.benchmarks.gpu_common import ceilings, copies, device, report, seconds

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


@dataclass(frozen=True)
class Program:
    """A timed call, the least bytes it moves and the operations it does."""

    name: str
    calls: Sequence[Callable[[], object]]
    """The same on different inputs."""
    nbytes: int
    flops: int = 0
    where: tuple[int, int, int] | None = None
    """(sequences, draft length, context) of attention."""


def programs(shapes: Shapes, place: torch.device, *, tiny: bool) -> Iterator[Program]:
    yield from _attention(shapes, place, tiny=tiny)
    yield from _rows(shapes, place, 7 if tiny else 8192)
    yield from _vocabulary(shapes, place, 2 if tiny else 64)
    yield from _heads(shapes, place, 2 if tiny else 16)
    yield from _products(shapes, place, (3,) if tiny else (1, 64, 2048))


def _attention(shapes: Shapes, place: torch.device, *, tiny: bool) -> Iterator[Program]:
    from kernels.triton.attention import attention
    from kernels.triton.attention_plan import plan_attention

    # The largest first: launch configurations are chosen on it.
    sizes = [(s, c) for s in (64, 8, 1) for c in (8192, 1024)]
    grid = [("decode", s, 0, c) for s, c in sizes] + [("verify", s, d, c) for d in (3, 7) for s, c in sizes]
    grid += [("prefill", 1, rows - 1, rows) for rows in (8192, 2048)] + [("prefill", 8, 1023, 1024)]
    if tiny:
        grid = [("decode", 2, 0, 40), ("verify", 2, 3, 40), ("prefill", 1, 19, 20)]
    for kind, sequences, drafts, context in grid:
        for fp8 in (False, True) if not tiny else (False,):
            rows = drafts + 1
            width = 1 if fp8 else shapes.dtype.itemsize
            keys = 2 * sequences * context * shapes.kv_heads * shapes.dim * width
            queries = sequences * rows * shapes.heads * shapes.dim * shapes.dtype.itemsize
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
            pairs = sequences * (rows * context - rows * (rows - 1) // 2)
            yield Program(
                f"attention {kind}{' fp8' if fp8 else ''}",
                calls,
                keys + 2 * queries,
                4 * pairs * shapes.heads * shapes.dim,
                (sequences, drafts, context),
            )


def _rows(shapes: Shapes, place: torch.device, rows: int) -> Iterator[Program]:
    from kernels.triton.gated_activation import gated_activation
    from kernels.triton.kv_write import rotary_kv_write
    from kernels.triton.rms_norm import add_rms_norm, rms_norm

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=place).to(shapes.dtype)

    x, residual, weight, gate_up = (
        normal(rows, shapes.hidden),
        normal(rows, shapes.hidden),
        normal(shapes.hidden),
        normal(rows, 2 * shapes.inner),
    )
    yield Program("rms_norm", [lambda: rms_norm(x, weight, 1e-6)], 2 * x.nbytes)
    yield Program("add_rms_norm", [lambda: add_rms_norm(x, residual, weight, 1e-6)], 4 * x.nbytes)
    yield Program("gated_activation", [lambda: gated_activation(gate_up, "silu")], gate_up.nbytes * 3 // 2)
    qkv = normal(rows, (shapes.heads + 2 * shapes.kv_heads) * shapes.dim)
    angles, norm = normal(rows, shapes.dim), normal(shapes.dim)
    caches = [torch.zeros(rows // 16 + 1, shapes.kv_heads, 16, shapes.dim, dtype=shapes.dtype, device=place) for _ in range(2)]
    slots = torch.randperm(rows, device=place)
    options: dict[str, Any] = {"num_heads": shapes.heads, "q_norm": norm, "k_norm": norm, "eps": 1e-6}
    yield Program(
        "rotary_kv_write", [lambda: rotary_kv_write(qkv, angles, angles, slots, *caches, **options)], 2 * qkv.nbytes + 2 * angles.nbytes
    )


def _vocabulary(shapes: Shapes, place: torch.device, rows: int) -> Iterator[Program]:
    from kernels.triton.sampling import token_log_probs, verify

    nbytes = rows * shapes.vocab * 4
    every = [3 * torch.randn(rows, shapes.vocab, device=place) for _ in range(copies(nbytes, place))]
    attempt = torch.zeros(1, dtype=torch.int64, device=place)
    drafts = torch.randint(0, shapes.vocab, (rows,), device=place)
    lines = torch.arange(rows, device=place)
    words = -(-shapes.vocab // 32)
    counts = torch.randint(0, 2, (rows, shapes.vocab), dtype=torch.int32, device=place)
    bits = torch.randint(-(2**31), 2**31, (rows, words), device=place).to(torch.int32)
    half = torch.full((rows,), 0.5, device=place)
    penalties = Penalties(counts, bits, lines.to(torch.int32), half, half, 1 + half, torch.zeros(rows, dtype=torch.int32, device=place))
    allowed = Allowed(bits, lines.to(torch.int32))
    kinds: list[tuple[str, int, int, float, dict[str, Any], int]] = [
        ("greedy", 0, 0, 1.0, {}, 0),
        ("greedy, penalties", 0, 0, 1.0, {"penalties": penalties}, counts.nbytes + bits.nbytes),
        ("greedy, mask", 0, 0, 1.0, {"allowed": allowed}, bits.nbytes),
        ("temperature", 2, 0, 1.0, {}, 0),
        ("top-k 50", 2, 50, 1.0, {}, 0),
        ("top-p 0.9", 2, 0, 0.9, {}, 0),
    ]
    for name, mode, top_k, top_p, rules, more in kinds:
        what = SampleRows(
            torch.full((rows,), mode, dtype=torch.int32, device=place),
            torch.ones(rows, device=place),
            torch.full((rows,), top_k, dtype=torch.int32, device=place),
            torch.full((rows,), top_p, device=place),
            drafts,
            drafts,
            drafts,
        )
        yield Program(f"verify {name}", [partial(verify, logits, what, attempt, **rules) for logits in every], nbytes + more)
    yield Program("token_log_probs 5", [partial(token_log_probs, logits, lines, drafts, 5) for logits in every], nbytes)


def _heads(shapes: Shapes, place: torch.device, sequences: int) -> Iterator[Program]:
    """The byte floor of a block: W2 once and the base logits once, for each of its 7 positions."""
    from kernels.triton.sequential_head import sequential_head

    length = 2 if shapes.vocab < 5000 else 7
    for vocab in (shapes.vocab,) if length == 2 else (32_000, shapes.vocab, 262_144):
        w1, w2 = (torch.randn(vocab, shapes.rank, device=place).to(shapes.dtype) for _ in range(2))
        logits = torch.randn(sequences, length, vocab, device=place).to(shapes.dtype)
        anchors = torch.randint(0, vocab, (sequences,), device=place)
        head = SequentialHead("vanilla", w1, w2)
        name = "sequential_head vanilla" if vocab == shapes.vocab else f"sequential_head vanilla, vocabulary {vocab}"
        nbytes = length * w2.nbytes + logits.nbytes
        yield Program(name, [partial(sequential_head, logits, None, anchors, head)], nbytes, 2 * sequences * length * vocab * shapes.rank)


def _products(shapes: Shapes, place: torch.device, all_rows: tuple[int, ...]) -> Iterator[Program]:
    from kernels.triton.fp8_linear import fp8_linear

    depth, columns = shapes.hidden, shapes.hidden
    weight = torch.randn(columns, depth, device=place).to(torch.float8_e4m3fn)
    block = (128, 128) if depth % 128 == 0 else (columns, depth)
    packed = Fp8Linear(weight, torch.ones(-(-columns // block[0]), -(-depth // block[1]), device=place), block)
    for rows in all_rows:
        nbytes = weight.nbytes + 2 * rows * depth * shapes.dtype.itemsize
        calls = []
        for _ in range(copies(nbytes, place)):
            x, own = torch.randn(rows, depth, device=place).to(shapes.dtype), Fp8Linear(weight.clone(), packed.scale, block)
            calls.append(partial(fp8_linear, x, own))
        yield Program(f"fp8_linear {rows} rows", calls, nbytes, 2 * rows * depth * columns)


def measure(program: Program, place: torch.device, ceiling: dict[str, float]) -> dict[str, Any]:
    taken = seconds(program.calls, place)
    sequences, drafts, context = program.where or (None, None, None)
    shares = {"bandwidth": program.nbytes / taken / ceiling["bytes_per_s"], "matrix": program.flops / taken / ceiling["flops_per_s"]}
    judged = place.type == "cuda" and (context or 8192) >= 8192
    kind, goal = GOALS.get(program.name.partition(",")[0], (None, 0.0)) if judged else (None, 0.0)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy shapes; always so without a GPU")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="file for the JSON, besides what is printed")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--untuned", action="store_true", help="run each kernel's first launch configuration")
    parser.add_argument("--tune", type=Path, help="folder of launch configurations: those in it are taken up, new ones are kept there")
    options = parser.parse_args()
    place = device()
    tiny = options.tiny or place.type == "cpu"
    from kernels.triton import tuning

    torch.manual_seed(0)
    ceiling = ceilings(place)
    with contextlib.ExitStack() as stack:
        if not options.untuned:
            folder = options.tune or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            tuning.load(folder, place)
            stack.enter_context(tuning.tuning(folder))
        rows = [
            measure(program, place, ceiling) for program in programs(Shapes.of(tiny=tiny), place, tiny=tiny) if options.only in program.name
        ]
    extra: dict[str, Any] = {
        "copy GB/s": round(ceiling["bytes_per_s"] * 1e-9, 1),
        "matmul TFLOP/s": round(ceiling["flops_per_s"] * 1e-12, 2),
        "kernels": "Triton" if place.type == "cuda" else "Triton's interpreter, tiny shapes: rates mean nothing",
    }
    if found := tuning.found(place):
        extra["launch configurations"] = "; ".join(f"{key}: {config}" for key, config in sorted(found.items()))
    report("kernels", place, rows, extra, as_json=options.json, out=options.out)


if __name__ == "__main__":
    sys.exit(main())
