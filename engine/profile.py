"""A quick profile of the target's step time, so that the first plans are not guesses."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import kernels
from engine.checkpoints.cache import make_once
from engine.runner import PackedStep
from engine.speculation.cost_model import Load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.batch import ModelSpec
    from engine.checkpoints.cache import SharedFolders
    from engine.runner import Runner

PROFILE = 3
"""Part of a stored profile's name: raise it when steps take another time than before (new kernels) or are measured otherwise."""

_REPEATS = 2
_DEEP = (2, 4)
"""Tokens a sequence in the largest steps: how far past one token each it pays to draft on a full batch shows only there."""
_PROMPT = 2048
_FILE = "steps.json"

_log = logging.getLogger(__name__)


class Profiles:
    """Profiles that were measured before, in `directory`/profiles and in `shared`: one a model, device, number of threads and versions."""

    def __init__(self, directory: Path, shared: SharedFolders | None = None) -> None:
        self._directory = directory / "profiles"
        self._shared = shared

    @contextmanager
    def tuned(self, device: torch.device) -> Iterator[None]:
        """Within it, kernels take up launch configurations found on this device before, and those of new shapes are measured and kept.

        Without a folder to keep them in, kernels run as they do untuned.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(kernels.tuned(self._directory.parent / "kernels", device))
            except OSError as error:
                _log.warning("launch configurations of kernels cannot be kept: %s", error)
            yield

    def steps(self, runner: Runner, spec: ModelSpec, max_sequences: int, max_tokens: int) -> tuple[list[tuple[Load, float]], bool]:
        """What `measure_steps` returns, and whether it was there already. A cache that cannot be used costs the measurement only."""
        measured: list[tuple[Load, float]] = []

        def build(folder: Path) -> None:
            measured.extend(measure_steps(runner, max_sequences, max_tokens))
            (folder / _FILE).write_text(to_json(measured))

        about = [*describe(spec, max_sequences, max_tokens), *(["fp8 KV"] if runner.kv.keys[0].dtype == torch.float8_e4m3fn else [])]
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        try:
            with self.tuned(spec.device):
                folder = make_once(self._directory / f"{spec.name.replace('/', '--')}-{name}", build, self._shared)
            if not measured:
                return from_json((folder / _FILE).read_text()), True
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("the cached profile of %s cannot be used: %s", spec.name, error)
        return measured or measure_steps(runner, max_sequences, max_tokens), False


def describe(spec: ModelSpec, max_sequences: int, max_tokens: int) -> list[str]:
    """Everything that a step's time depends on, as far as it can be named."""
    on_cuda = spec.device.type == "cuda"
    device = torch.cuda.get_device_name(spec.device) if on_cuda else f"{_processor()}, {torch.get_num_threads()} threads"
    return [str(PROFILE), spec.name, spec.revision, spec.precision, device, torch.__version__, str(max_sequences), str(max_tokens)]


def to_json(points: list[tuple[Load, float]]) -> str:
    """[[tokens, rows, KV tokens, seconds], ...]."""
    return json.dumps([[load.tokens, load.rows, load.kv_tokens, seconds] for load, seconds in points])


def from_json(text: str) -> list[tuple[Load, float]]:
    """Raises ValueError for anything that `to_json` does not write."""
    points = [(Load(int(tokens), int(rows), int(kv)), float(seconds)) for tokens, rows, kv, seconds in json.loads(text)]
    if not points or any(seconds <= 0.0 for _, seconds in points):
        raise ValueError("it has no measurements")
    return points


def _processor() -> str:
    """The CPU's model name where Linux tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def warm_up(runner: Runner, max_tokens: int) -> None:
    """Runs one step of one token, so that what is done once (compiling kernels, say) is done while loading and not in the first request.

    On a GPU also one of a long prompt, whose attention runs in a shape of its own (and is tuned for it, within `Profiles.tuned`).
    """
    _seconds(runner, _dummy(1))
    if runner.latest is not None:
        _seconds(runner, _prompt(min(max_tokens, _PROMPT, runner.model.spec.max_positions), runner.kv.block_size))


def measure_steps(runner: Runner, max_sequences: int, max_tokens: int) -> list[tuple[Load, float]]:
    """Seconds of steps with 1, 2, 4 ... `max_sequences` sequences of one token, and of some with more; the better of two runs each.

    Writes into block 0 alone, which no sequence ever holds. The larger sizes come first, so that one-time work (kernel
    selection, allocator growth) is over before the small ones, where it would weigh most.
    """
    sizes = {(min(2**power, max_sequences), 1) for power in range(max_sequences.bit_length() + 1)}
    sizes |= {(max_sequences, each) for each in _DEEP if max_sequences * each <= max_tokens}
    ordered = sorted(sizes, key=lambda size: -size[0] * size[1])
    _seconds(runner, _dummy(*ordered[0]))
    return [
        (Load(count * each, count * each, count * each), min(_seconds(runner, _dummy(count, each)) for _ in range(_REPEATS)))
        for count, each in ordered
    ]


def _prompt(count: int, block_size: int) -> PackedStep:
    """The first `count` tokens of one sequence, all in block 0."""
    index = np.arange(count, dtype=np.int64)
    return PackedStep(
        token_ids=np.zeros(count, np.int64),
        positions=index,
        slots=index % block_size,
        tables=np.zeros((1, -(-count // block_size)), np.int32),
        query_start=np.array([0, count], np.int32),
        kv_lengths=np.array([count], np.int32),
        logit_rows=index[-1:],
        row_starts=np.zeros(1, np.int64),
        row_counts=np.ones(1, np.int64),
        shared_prefix_blocks=0,
    )


def _dummy(count: int, each: int = 1) -> PackedStep:
    """`count` sequences of `each` tokens, all with logits."""
    index = np.arange(count * each, dtype=np.int64)
    zeros = np.zeros(count * each, np.int64)
    return PackedStep(
        token_ids=zeros,
        positions=index % each,
        slots=index % each,
        tables=np.zeros((count, 1), np.int32),
        query_start=np.arange(count + 1, dtype=np.int32) * np.int32(each),
        kv_lengths=np.full(count, each, np.int32),
        logit_rows=index,
        row_starts=np.arange(count, dtype=np.int64) * each,
        row_counts=np.full(count, each, np.int64),
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
