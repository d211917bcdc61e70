"""A quick profile of the target's step time, so that the first plans are not guesses."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch

import kernels
from engine.batch import Peaks
from engine.checkpoints.cache import make_once
from engine.drafter_records import DrafterRecords
from engine.runner import PackedStep, Runner
from engine.speculation.cost_model import Load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from engine.batch import ModelSpec
    from engine.checkpoints.cache import SharedFolders

PROFILE = 8
"""Part of a stored profile's name: raise it when steps take another time than before (new kernels) or are measured otherwise."""

_TURNS, _SECONDS = 8, 10.0
"""Turns over all steps at most, and seconds after which none begins; two are taken in any case. A busy machine makes some steps of a turn
look ten times as long, and what is kept is used for a long time."""
_SETTLED = 0.03
"""A turn that finds steps faster than those before it did by less than this on average is the last."""
_STALE, _PROBED = 0.4, 16
"""A profile in which steps of up to so many tokens take over 1 / _STALE of what they take now (the median) was made at a busy time."""
_VERIFIED = 64
"""Tokens of the largest verification, where four each are fewer."""
_PROMPT = 2048
"""Tokens of the longest prompt."""
_CONTEXT = 160
"""Tokens. On a CPU their pages were written before: pages that never were are read from a single one."""
_DEEP, _SEQUENCES, _ROWS = 4096, 64, (1, 8, 16)
"""Context, sequences and rows of each in steps that launch configurations are chosen on: attention has one for each of these heights."""
_FILE = "steps.json"

_log = logging.getLogger(__name__)


class Profiles:
    """Profiles that were measured before, in `directory`/profiles and in `shared`: one a model, device, number of threads and versions.

    keep_records: whether what jobs teach about drafters is used and kept, too; not for those who judge them.
    """

    def __init__(self, directory: Path, shared: SharedFolders | None = None, *, keep_records: bool = True) -> None:
        self._directory = directory / "profiles"
        self._shared = shared
        self._keep_records = keep_records

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

    def drafters(self, spec: ModelSpec, stamp: Callable[[str], tuple[object, ...]]) -> DrafterRecords | None:
        """What was learned of drafters for this model on this device in earlier jobs, beside the profiles. stamp: see `DrafterRecords`."""
        if not self._keep_records:
            return None
        return DrafterRecords(self._directory.parent / "drafter-records", describe(spec), stamp)

    def steps(self, runner: Runner, spec: ModelSpec, max_sequences: int, max_tokens: int) -> tuple[list[tuple[Load, float]], bool]:
        """What `measure_steps` returns, and whether it was there already. A cache that cannot be used costs the measurement only.

        One that was measured while the machine was busy is measured anew.
        """
        measured: list[tuple[Load, float]] = []

        def build(folder: Path) -> None:
            measured.extend(measure_steps(runner, max_sequences, max_tokens))
            scratch = folder / f".{_FILE}-{os.getpid()}"
            scratch.write_text(to_json(measured))
            scratch.replace(folder / _FILE)

        about = [
            *describe(spec),
            str(max_sequences),
            str(max_tokens),
            *(["fp8 KV"] if runner.kv.keys[0].dtype == torch.float8_e4m3fn else []),
        ]
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        try:
            with self.tuned(spec.device):
                folder = make_once(self._directory / f"{spec.name.replace('/', '--')}-{name}", build, self._shared)
                if not measured:
                    stored = _read(folder / _FILE)
                    if stored and not _stale(runner, stored, max_sequences, max_tokens):
                        return stored, True
                    build(folder)
                    if self._shared is not None:
                        self._shared.put(f"{self._directory.name}/{folder.name}", folder)
        except OSError as error:
            _log.warning("the profile of %s cannot be kept: %s", spec.name, error)
        return measured or measure_steps(runner, max_sequences, max_tokens), False


def _read(path: Path) -> list[tuple[Load, float]]:
    """Nothing where it is spoilt."""
    try:
        return from_json(path.read_text())
    except (OSError, ValueError, TypeError) as error:
        _log.warning("the profile in %s is measured again, it cannot be used: %s", path, error)
        return []


def _stale(runner: Runner, stored: list[tuple[Load, float]], max_sequences: int, max_tokens: int) -> bool:
    """Whether small steps take so much less now than they did then that the machine must have been busy.

    Not asked of a GPU, which runs one thing after the other, and where the first step of a size takes its time to be captured.
    """
    if runner.model.spec.device.type == "cuda":
        return False
    known = dict(stored)
    small = [shape for shape in _shapes_of(runner, max_sequences, max_tokens) if shape.load.tokens <= _PROBED and shape.load in known]
    shares = [_seconds(runner, shape.step(runner.kv.block_size)) / known[shape.load] for shape in small]
    if not shares or median(shares) >= _STALE:
        return False
    _log.warning("small steps take %.0f%% of what a stored profile says: it is measured again", 100 * median(shares))
    return True


def describe(spec: ModelSpec) -> list[str]:
    """Everything that the time of steps of a size depends on, as far as it can be named."""
    on_cuda = spec.device.type == "cuda"
    device = torch.cuda.get_device_name(spec.device) if on_cuda else f"{_processor()}, {torch.get_num_threads()} threads"
    return [str(PROFILE), spec.name, spec.revision, spec.precision, device, torch.__version__]


def to_json(points: list[tuple[Load, float]]) -> str:
    """[[tokens, rows, KV tokens, pairs, seconds], ...]."""
    return json.dumps([[load.tokens, load.rows, load.kv_tokens, load.pairs, seconds] for load, seconds in points])


def from_json(text: str) -> list[tuple[Load, float]]:
    """Raises ValueError for anything that `to_json` does not write."""
    points = [(Load(*map(int, sizes)), float(seconds)) for *sizes, seconds in json.loads(text)]
    if not points or any(seconds <= 0.0 for _, seconds in points):
        raise ValueError("it has no measurements")
    return points


def _processor() -> str:
    """The CPU's name, family and model where Linux tells them: virtual machines of several generations go by one name."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        first = ""
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    known = [said[name] for name in ("model name", "cpu family", "model") if name in said]
    return ", ".join(known) or platform.processor() or platform.machine()


def warm_up(runner: Runner, max_tokens: int) -> None:
    """Runs one step of one token, so that what is done once (compiling kernels, say) is done while loading and not in the first request.

    On a GPU also one of a long prompt, whose attention runs in a shape of its own (and is tuned for it, within `Profiles.tuned`).
    """
    if runner.model.spec.device.type == "cuda":
        tune_attention(runner, max_tokens)
    _seconds(runner, Shape(1, 1).step(runner.kv.block_size))
    if runner.latest is not None:
        longest = min(max_tokens, _PROMPT, runner.model.spec.max_positions)
        _seconds(runner, Shape(1, longest, verifies=False).step(runner.kv.block_size))


def tune_attention(runner: Runner, max_tokens: int) -> None:
    """Runs steps of the size that counts, so that within `Profiles.tuned` launch configurations are chosen on these and not on the first
    shapes that happen to come. Eagerly: a captured graph of each would stay.
    """
    size, blocks = runner.kv.block_size, runner.kv.num_blocks - 1
    for rows in _ROWS:
        each = min(rows, max_tokens, runner.model.spec.max_positions)
        context = min(_DEEP, runner.model.spec.max_positions - each, blocks * size) // size * size
        sequences = min(_SEQUENCES, max_tokens // each, blocks * size // max(context, 1))
        Runner.run(runner, Shape(sequences, each, context, verifies=False).step(size))


def measure_steps(runner: Runner, max_sequences: int, max_tokens: int) -> list[tuple[Load, float]]:
    """Seconds of steps of the kinds that a run is made of (see `shapes`), each the least of some turns over all of them.

    Writes into block 0 alone, which no sequence ever holds, and reads whatever lies in the others. The larger sizes come first, so that
    one-time work (kernel selection, allocator growth) is over before the small ones, where it would weigh most.
    """
    made = sorted(_shapes_of(runner, max_sequences, max_tokens), key=lambda shape: (-shape.sequences * shape.each, -shape.context))
    steps = [(shape.load, shape.step(runner.kv.block_size)) for shape in made]
    began = time.perf_counter()
    least = np.array([_seconds(runner, step) for _, step in steps])
    for _ in range(1, _TURNS):
        now = np.minimum(least, [_seconds(runner, step) for _, step in steps])
        gain, least = float(np.log(least / now).mean()), now
        if gain < _SETTLED or time.perf_counter() - began > _SECONDS:
            break
    return undisturbed([(load, seconds) for (load, _), seconds in zip(steps, least.tolist(), strict=True)])


def undisturbed(points: list[tuple[Load, float]]) -> list[tuple[Load, float]]:
    """No step takes longer than one that does at least as much of everything: where one did, something else ran meanwhile."""
    return [(load, min(seconds for other, seconds in points if other.covers(load))) for load, _ in points]


@dataclass(frozen=True, slots=True)
class Shape:
    """`sequences` of `each` tokens after `context` more. `verifies`: every token has logits, otherwise only the last of each sequence."""

    sequences: int
    each: int
    context: int = 0
    verifies: bool = True

    @property
    def load(self) -> Load:
        tokens, length = self.sequences * self.each, self.context + self.each
        pairs = self.sequences * (self.each * self.context + self.each * (self.each + 1) // 2)
        return Load(tokens, tokens if self.verifies else self.sequences, self.sequences * length, pairs)

    def step(self, block_size: int) -> PackedStep:
        """Tokens are written to block 0; contexts are read from as many blocks as they would take."""
        count, width = self.sequences * self.each, -(-(self.context + self.each) // block_size)
        index = np.arange(count, dtype=np.int64)
        positions = self.context + index % self.each
        tables = np.zeros((self.sequences, width), np.int32)
        read = self.context // block_size
        tables[:, :read] = 1 + np.arange(self.sequences * read, dtype=np.int32).reshape(self.sequences, read)
        rows = index if self.verifies else index[self.each - 1 :: self.each]
        return PackedStep(
            token_ids=np.zeros(count, np.int64),
            positions=positions,
            slots=positions % block_size,
            tables=tables,
            query_start=np.arange(self.sequences + 1, dtype=np.int32) * np.int32(self.each),
            kv_lengths=np.full(self.sequences, self.context + self.each, np.int32),
            logit_rows=rows,
            row_starts=np.arange(self.sequences, dtype=np.int64) * (len(rows) // self.sequences),
            row_counts=np.full(self.sequences, len(rows) // self.sequences, np.int64),
            shared_prefix_blocks=0,
        )


def _shapes_of(runner: Runner, max_sequences: int, max_tokens: int) -> set[Shape]:
    return shapes(max_sequences, max_tokens, runner.model.spec.max_positions, runner.kv.num_blocks, runner.kv.block_size)


def shapes(max_sequences: int, max_tokens: int, max_positions: int, num_blocks: int, block_size: int) -> set[Shape]:
    """Decoding at every batch size, verification of more and more drafts, prompts, and decoding and verification after some context.

    How far past one token each it pays to draft on a full batch, or on a single sequence, shows only in steps of that many tokens.
    """
    drafted = [each for each in (2, 4, 8, 16, 32, 64) if max_sequences * each <= min(max_tokens, max(4 * max_sequences, _VERIFIED))]
    prompts = {min(2**power, max_tokens) for power in range(6, max_tokens.bit_length() + 1)}
    context = min(_CONTEXT, (num_blocks - 1) // max_sequences * block_size) // block_size * block_size
    made = {Shape(min(2**power, max_sequences), 1) for power in range(max_sequences.bit_length() + 1)}
    made |= {Shape(max_sequences, each) for each in drafted}
    made |= {Shape(1, count, verifies=False) for count in prompts if count <= _PROMPT}
    made |= {Shape(count, each, context) for count in {max_sequences, -(-max_sequences // 8)} for each in (1, *drafted[:1]) if context}
    return {shape for shape in made if shape.context + shape.each <= max_positions}


def _seconds(runner: Runner, step: PackedStep) -> float:
    started = time.perf_counter()
    output = runner.run(step, peaks=True)
    if runner.model.spec.device.type == "cuda":
        torch.cuda.synchronize(runner.model.spec.device)
    elif output.peaks is None:
        Peaks.of(output.logits)
    return time.perf_counter() - started
