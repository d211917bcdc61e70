"""Wake-ups of workers, and what runs the lines."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from service.domain.line import LineOutcome, LineWork


class TaskQueue(Protocol):
    """Hints to workers. Losing, repeating or delaying one changes latency and nothing else."""

    def wake(self, model: str) -> None:
        """Raises Unavailable where the broker does not answer."""
        ...

    def ping(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RunnerStats:
    """Read while a run is going on, from another thread."""

    tokens_per_second: float = 0.0
    acceptance_length: float = 0.0
    running: int = 0
    waiting: int = 0
    busy_ns: int = 0
    load_ns: int = 0
    profile_ns: int = 0
    profile_reused: bool = False
    """Whether the last load found this machine's profile instead of measuring it."""
    first_token_ns: int = 0
    """From the first step after the last load to the first token that was sampled; 0 until then."""
    steps: int = 0
    kv_usage: float = 0.0
    """Share of the KV cache that running lines hold, 0 to 1."""
    kv_bytes: int = 0
    """The loaded model's whole KV cache."""
    kv_peak_bytes: int = 0
    """What running lines held of it at most."""
    context: int = 0
    """Tokens that the loaded model's prompt and answer may have together; 0 where nothing is loaded."""


@runtime_checkable
class Recalls(Protocol):
    """A runner that finished answers of a batch help with the rest of it."""

    def recall(self, answers: Iterable[str]) -> None:
        """Texts that were delivered before, by whomever. Not while `run` is being driven."""
        ...


class InferenceRunner(Protocol):
    """Answers lines. One model at a time."""

    def load(self, model: str) -> None:
        """Makes `model` the loaded one (unloading another). Raises ModelUnavailable."""
        ...

    def run(self, lines: Iterable[LineWork | None]) -> Iterator[LineOutcome]:
        """Consumes lazily, yields as lines finish. `None` from `lines` means: nothing right now, keep stepping."""
        ...

    def abort(self, keys: Collection[tuple[str, int]]) -> None:
        """From any thread: these lines are no longer wanted and yield nothing."""
        ...

    def stats(self) -> RunnerStats: ...
    @property
    def capacity(self) -> int:
        """How many lines the engine can hold at once, roughly."""
        ...

    @property
    def device(self) -> str: ...
    def close(self) -> None: ...
