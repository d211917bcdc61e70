"""Stores of the workers, and of the models that they loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker process and where its wall time went, nanoseconds."""

    id: str
    host: str
    pid: int
    device: str
    started_at: datetime
    seen_at: datetime
    stopped_at: datetime | None
    model: str | None = None
    busy_ns: int = 0
    idle_ns: int = 0
    load_ns: int = 0
    profile_ns: int = 0
    tokens_per_second: float = 0.0
    acceptance_length: float = 0.0


class WorkerStore(Protocol):
    def register(self, worker_id: str, *, host: str, pid: int, device: str) -> None: ...
    def beat(self, worker: WorkerRow) -> None:
        """Writes the meters and raises `seen_at` to database time."""
        ...

    def stop(self, worker_id: str) -> None: ...
    def get(self, worker_id: str) -> WorkerRow | None: ...
    def live(self, within: timedelta) -> Sequence[WorkerRow]: ...


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """One attempt of a worker to load a model, for a batch whose groups it had claimed. Nanoseconds.

    `spawn_ns`: from the start of the process until the worker was registered; 0 but for the first load of a process. `error`: why it was
    refused, None where it was loaded; `lasting`: trying again on the same machine will not help.
    """

    worker_id: str
    model: str
    batch_id: str | None
    claimed_at: datetime
    spawn_ns: int = 0
    load_ns: int = 0
    profile_ns: int = 0
    profile_reused: bool = False
    error: str | None = None
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class LoadRow:
    """A load as it is reported. `due_at`: when the batch's groups became due. `prefill_ns`: from the first step to the first token;
    `decode_ns`: from there to the commit of the first results."""

    load: ModelLoad
    device: str
    submitted_at: datetime | None
    due_at: datetime | None
    ended_at: datetime
    first_result_at: datetime | None
    prefill_ns: int
    decode_ns: int


@dataclass(frozen=True, slots=True)
class Refusals:
    """How often a model was refused, and how many of these refusals were lasting."""

    count: int
    lasting: int


class LoadStore(Protocol):
    """Loads of models by workers."""

    def note(self, load: ModelLoad) -> int:
        """Records it and returns its id."""
        ...

    def answered(self, load_id: int, *, prefill_ns: int, decode_ns: int) -> None:
        """The first results after this load are committed."""
        ...

    def between(self, start: datetime, end: datetime) -> Sequence[LoadRow]: ...
    def refusals(self, model: str, within: timedelta) -> Refusals:
        """Of that time; none where any worker could load the model in it."""
        ...

    def obstacles(self, batch_ids: Collection[str], within: timedelta) -> Mapping[str, Sequence[tuple[str, str]]]:
        """Batch -> (model, error) of models with open groups whose last load, in that time, was refused."""
        ...
