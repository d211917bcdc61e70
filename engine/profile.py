"""A quick profile of the target's step time, so that the first plans are not guesses."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.runner import PackedStep
from engine.speculation.cost_model import Load

if TYPE_CHECKING:
    from engine.runner import Runner

_REPEATS = 2


def measure_steps(runner: Runner, max_sequences: int) -> list[tuple[Load, float]]:
    """Seconds of steps with 1, 2, 4 ... `max_sequences` sequences of one token; the better of two runs each.

    Writes into block 0 alone, which no sequence ever holds. The larger sizes come first, so that one-time work (kernel
    selection, allocator growth) is over before the small ones, where it would weigh most.
    """
    sizes = sorted({min(2**power, max_sequences) for power in range(max_sequences.bit_length() + 1)}, reverse=True)
    _seconds(runner, _dummy(sizes[-1]))
    return [(Load(size, size, size), min(_seconds(runner, _dummy(size)) for _ in range(_REPEATS))) for size in sizes]


def _dummy(size: int) -> PackedStep:
    index = np.arange(size, dtype=np.int64)
    zeros = np.zeros(size, np.int64)
    return PackedStep(
        token_ids=zeros,
        positions=zeros,
        slots=zeros,
        tables=np.zeros((size, 1), np.int32),
        query_start=np.arange(size + 1, dtype=np.int32),
        kv_lengths=np.ones(size, np.int32),
        logit_rows=index,
        row_starts=index,
        row_counts=np.ones(size, np.int64),
        shared_prefix_blocks=0,
    )


def _seconds(runner: Runner, step: PackedStep) -> float:
    started = time.perf_counter()
    logits = runner.run(step).logits
    if logits.device.type == "cuda":
        torch.cuda.synchronize(logits.device)
    else:
        logits.max(1)
    return time.perf_counter() - started
