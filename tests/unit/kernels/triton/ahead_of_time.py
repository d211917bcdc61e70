"""Compiles kernels for devices that are not there: launchers run as always, on CPU tensors, and a launch compiles instead of running.

So what is compiled is what a launch on such a device would compile, specialisation and all, down to the machine code that `ptxas` makes.
`python -m tests.unit.kernels.triton.ahead_of_time` compiles every program for every target and prints a table and one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

from kernels.reference.fp8_linear import Fp8Linear
from kernels.reference.sampling import Allowed, Biases, DraftWeights, Penalties, SampleRows, Tally, Verdict
from kernels.reference.sequential_head import SequentialHead
from kernels.triton import draft_budget, fp8_linear, gated_activation, kv_write, rms_norm, sampling, sequential_head
from kernels.triton.ahead import Absent, compiling
from kernels.triton.attention import attention
from kernels.triton.attention_plan import plan_attention
from kernels.triton.target import Traits

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
"""Bytes that a program may have. A launch that asks for more fails on the device, so it fails here too."""
REQUIRED = ("sm_80", "sm_90")
"""gfx942 (ROCm) is compiled to see that nothing shuts it out; no figure is claimed for it."""

BF16 = torch.bfloat16
HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
HIDDEN, INNER, VOCAB, RANK = 4096, 12288, 151_936, 256


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[dict[str, int]]:
    """Within it, launches compile for `target` (see TARGETS). Gives the bytes of machine code by kernel; errors are the compiler's own."""
    assert not triton.knobs.runtime.interpret, "the interpreter is on: nothing would be compiled"
    found: dict[str, int] = {}

    def compiled(kernel: Any, made: Any) -> None:
        if made.metadata.shared > SHARED_MEMORY[target]:
            raise OutOfResources(made.metadata.shared, SHARED_MEMORY[target], "shared memory")
        found[kernel.__name__] = len(made.asm["hsaco" if TARGETS[target].backend == "hip" else "cubin"])

    with compiling(Absent(TARGETS[target], Traits(132, converts_fp8=target == "sm_90")), compiled):
        yield found


def programs() -> dict[str, Callable[[], object]]:
    """One launch of every op and variant on an 8B-class model's shapes."""
    found: dict[str, Callable[[], object]] = {
        "attention decode": partial(_attention, 1),
        "attention verify": partial(_attention, 8),
        "attention prefill": partial(_attention, 512),
        "attention window, soft cap": partial(_attention, 8, window=1024, soft_cap=30.0),
        "attention draft block": partial(_attention, 7, causal=False),
        "attention float32": partial(_attention, 8, dtype=torch.float32),
        "attention float16": partial(_attention, 8, dtype=torch.float16),
        "attention fp8 decode": partial(_attention, 1, fp8=True),
        "attention fp8 prefill": partial(_attention, 512, fp8=True),
        "attention heads of 64 decode": partial(_attention, 1, heads=9, kv_heads=3, dim=64),
        "attention heads of 64 prefill": partial(_attention, 512, heads=9, kv_heads=3, dim=64),
        "attention heads of 256 decode": partial(_attention, 1, heads=8, kv_heads=1, dim=256),
        "attention heads of 256 prefill": partial(_attention, 512, heads=8, kv_heads=1, dim=256),
        "rotary_kv_write": partial(_rotary_kv_write, fp8=False),
        "rotary_kv_write fp8": partial(_rotary_kv_write, fp8=True),
        "rms_norm": lambda: rms_norm.rms_norm(_zeros(3, HIDDEN), _zeros(HIDDEN), 1e-6),
        "add_rms_norm": lambda: rms_norm.add_rms_norm(_zeros(3, HIDDEN), _zeros(3, HIDDEN), _zeros(HIDDEN), 1e-6),
        "verify": partial(_verify, full=False),
        "verify with everything": partial(_verify, full=True),
        "token_log_probs": lambda: sampling.token_log_probs(torch.zeros(4, VOCAB), _ints(4), _ints(4), 20),
        "accept_drafts": lambda: sampling.accept_drafts(Verdict(_ints(4), _ints(4) > 0, _ints(4) > 0), _ints(3).int()),
        "accept_drafts counted": lambda: sampling.accept_drafts(
            Verdict(_ints(4), _ints(4) > 0, _ints(4) > 0), _ints(3).int(), Tally(_ints(2, VOCAB).int(), _ints(2).int(), _ints(4))
        ),
        "allocate_top": lambda: draft_budget.allocate_top(torch.zeros(256, 16), _ints(1)),
    }
    for activation in ("silu", "gelu", "gelu_tanh", "relu"):
        found[f"gated_activation {activation}"] = partial(gated_activation.gated_activation, _zeros(3, 2 * INNER), activation)
    for kind in ("none", "vanilla", "gated", "rnn"):
        found[f"sequential_head {kind}"] = partial(_sequential_head, kind)
    found["sequential_head of 64"] = partial(_sequential_head, "vanilla", 64)
    found["sequential_head of 64, float32"] = partial(_sequential_head, "vanilla", 64, torch.float32)
    for rows in (1, 64, 2048):
        found[f"fp8_linear {rows} rows"] = partial(_fp8_linear, rows)
    return found


def _zeros(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def _ints(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


def _attention(
    rows: int, *, dtype: torch.dtype = BF16, fp8: bool = False, soft_cap: float | None = None, heads: int = HEADS, kv_heads: int = KV_HEADS,
    dim: int = DIM, **options: Any,
) -> None:  # fmt: skip
    sequences = 4
    cache = _zeros(64, kv_heads, PAGE, dim, dtype=torch.float8_e4m3fn if fp8 else dtype)
    bounds = torch.arange(0, sequences * rows + 1, rows).int()
    plan = plan_attention(
        _ints(sequences, 600).int(), bounds, _ints(sequences).int() + 8192, _ints(sequences * rows), cache=cache, num_heads=heads,
        max_query=rows, processors=132, **options,
    )  # fmt: skip
    scale = torch.ones(kv_heads) if fp8 else None
    attention(_zeros(sequences * rows, heads, dim, dtype=dtype), cache, cache, plan, 0.1, soft_cap, k_scale=scale, v_scale=scale)


def _rotary_kv_write(*, fp8: bool) -> None:
    cache = _zeros(9, KV_HEADS, PAGE, DIM, dtype=torch.float8_e4m3fn if fp8 else BF16)
    qkv, angles, norm = _zeros(3, (HEADS + 2 * KV_HEADS) * DIM), _zeros(3, DIM), _zeros(DIM)
    scale = torch.ones(KV_HEADS) if fp8 else None
    kv_write.rotary_kv_write(
        qkv, angles, angles, _ints(3), cache, cache, num_heads=HEADS, q_norm=norm, k_norm=norm, eps=1e-6, k_scale=scale, v_scale=scale
    )


def _verify(*, full: bool) -> None:
    rows, words = 4, -(-VOCAB // 32)
    i32, f32 = _ints(rows).int(), torch.ones(rows)
    options: dict[str, Any] = {}
    if full:
        options["draft"] = DraftWeights(torch.zeros(rows, VOCAB), f32)
        options["biases"] = Biases(torch.zeros(2, VOCAB), i32)
        options["penalties"] = Penalties(_ints(2, VOCAB).int(), _ints(2, words).int(), i32, f32, f32, f32, i32)
        options["allowed"] = Allowed(_ints(2, words).int(), i32)
    logits = torch.zeros(rows, VOCAB, dtype=BF16 if full else torch.float32)
    sampling.verify(logits, SampleRows(i32, f32, i32, f32, _ints(rows), _ints(rows), _ints(rows)), _ints(1), **options)


def _sequential_head(kind: Any, size: int = 2, dtype: torch.dtype = BF16) -> None:
    rows = {"gated": (RANK, HIDDEN + RANK), "rnn": (3 * RANK, 2 * RANK + HIDDEN)}.get(kind)
    plain = kind == "none"
    zeros = partial(_zeros, dtype=dtype)
    head = SequentialHead(
        kind,
        None if plain else zeros(VOCAB, RANK),
        None if plain else zeros(VOCAB, RANK),
        None if rows is None else zeros(*rows),
        None if rows is None else zeros(rows[0]),
        zeros(HIDDEN if plain else HIDDEN + RANK),
        zeros(1),
    )
    options: dict[str, Any] = {"temperatures": torch.ones(size), "keys": _ints(size, 2), "keep_weights": size == 2}
    sequential_head.sequential_head(zeros(size, 2, VOCAB), zeros(size, 2, HIDDEN), _ints(size), head, **options)


def _fp8_linear(rows: int) -> None:
    packed = Fp8Linear(_zeros(HIDDEN, HIDDEN, dtype=torch.float8_e4m3fn), torch.ones(32, 32), (128, 128))
    fp8_linear.fp8_linear(_zeros(rows, HIDDEN), packed, _zeros(rows, HIDDEN))


def main() -> int:
    """Prints a line for each program and target, and last a JSON object with `pass` (all REQUIRED targets compiled)."""
    failed: dict[str, str] = {}
    count = 0
    for name, program in programs().items():
        for target in TARGETS:
            started = time.monotonic()
            try:
                with compiling_for(target) as kernels:
                    program()
            except Exception as error:  # noqa: BLE001 - whatever a compiler throws is the result
                failed[f"{name} / {target}"] = f"{type(error).__name__}: {error}"[:300]
                outcome = f"FAILED: {failed[f'{name} / {target}']}"
            else:
                count += target in REQUIRED
                outcome = ", ".join(f"{kernel} {size} bytes" for kernel, size in kernels.items())
            sys.stdout.write(f"{name:32} {target:7} {time.monotonic() - started:5.1f} s  {outcome}\n")
            sys.stdout.flush()
    passed = count == len(programs()) * len(REQUIRED)
    sys.stdout.write(json.dumps({"programs": len(programs()), "targets": list(REQUIRED), "failed": failed, "pass": passed}) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
