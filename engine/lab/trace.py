"""A recorded run: what arrived, what every step did and took, and what came of each request. JSON lines, one record each.

Times are seconds since the trace began. Token ids are exact, so that a replay shares the same prefixes, and lookup drafters find what they
found (or would have found): the file holds the job's prompts and answers, and is as confidential as they are.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.speculation.cost_model import Load
from engine.speculation.experience import Experience
from engine.types import FinishReason, Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from engine.sequence import Sequence

VERSION = 3


class TraceError(ValueError):
    """A file that is not a trace, or not a whole one; the message names the line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """The engine that ran. `drafter`: what a request's `auto` came to, `members`: the drafters of its portfolio, the text lookup first.

    `profile`: (tokens, rows, kv_tokens, pairs, seconds) of the steps measured at its start. `experience`: what it knew of drafters then, by
    name, as `Experience.to_json` writes it.
    """

    model: str
    device: str
    max_sequences: int
    max_step_tokens: int
    num_blocks: int
    block_size: int
    max_positions: int
    look_ahead: int
    share_prefixes: bool
    drafter: str
    members: tuple[str, ...]
    max_draft_tokens: int
    fixed_drafts: int | None
    profile: tuple[tuple[int, int, int, int, float], ...] = ()
    experience: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """`at`: when it was pulled. `awaited`: the source had nothing to give before; otherwise it could have been had earlier."""

    number: int
    at: float
    awaited: bool
    prompt: tuple[int, ...]
    max_tokens: int
    template: str | None
    priority: int
    deadline: float | None
    drafter: str
    greedy: bool

    def request(self) -> Request:
        """The request as an engine takes it; a replay knows its answer, so how it was sampled no longer matters."""
        sampling = SamplingParams(max_tokens=self.max_tokens, temperature=0.0)
        return Request(str(self.number), self.prompt, sampling, self.template, self.priority, self.deadline, self.drafter)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step from `at` on: `seconds` on the device, `draft_seconds` before it; what the cost model `predicted` of it, without knowing it.

    `drafted`, `chosen` (for verification) and `accepted` drafts, and `survival` of each drafted one: one entry a decoding sequence, and
    empty where nothing was drafted at all. `groups`: (drafter, the sequences whose drafts it made). `passes`: (drafter, requests that it
    was asked for, seconds): of lookups also those whose drafts were not taken.
    """

    at: float
    tokens: int
    rows: int
    kv_tokens: int
    pairs: int
    decoding: int
    chunks: int
    seconds: float
    draft_seconds: float
    predicted: float | None
    preempted: int = 0
    drafted: tuple[int, ...] = ()
    chosen: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    survival: tuple[tuple[float, ...], ...] = ()
    groups: tuple[tuple[str, tuple[int, ...]], ...] = ()
    passes: tuple[tuple[str, int, float], ...] = ()

    @property
    def load(self) -> Load:
        return Load(self.tokens, self.rows, self.kv_tokens, self.pairs)


@dataclass(frozen=True, slots=True)
class EndRecord:
    """How a request ended: `output` holds its tokens, end token included."""

    number: int
    at: float
    reason: str
    output: tuple[int, ...]


@dataclass(slots=True)
class Trace:
    """A whole trace. Requests that were aborted or failed have no answer, and a replay leaves them out."""

    engine: EngineRecord
    requests: list[RequestRecord] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    ends: dict[int, EndRecord] = field(default_factory=dict)

    def answered(self) -> list[tuple[RequestRecord, EndRecord]]:
        """Requests with their answers, in order of arrival."""
        good = (FinishReason.STOP, FinishReason.LENGTH)
        pairs = [(request, self.ends[request.number]) for request in self.requests if request.number in self.ends]
        return [(request, end) for request, end in pairs if end.reason in good and end.output]

    @property
    def seconds(self) -> float:
        """From the first step's start to the last end."""
        if not self.steps or not self.ends:
            return 0.0
        return max(end.at for end in self.ends.values()) - self.steps[0].at

    @property
    def generated(self) -> int:
        return sum(len(end.output) for end in self.ends.values())

    @property
    def tokens_per_second(self) -> float:
        return self.generated / self.seconds if self.seconds > 0 else 0.0

    def model_error(self) -> float | None:
        """Median relative error of the cost model's predictions, each made before the model had seen the step. None without any."""
        errors = sorted(abs(step.predicted - step.seconds) / step.seconds for step in self.steps if step.predicted is not None)
        return errors[len(errors) // 2] if errors else None


class TraceWriter:
    """Appends a running engine's records to a file, which is emptied first. Raises OSError where it cannot be written."""

    def __init__(self, path: Path, engine: EngineRecord) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._began = time.perf_counter()
        self._write({"trace": VERSION, **asdict(engine)})

    def now(self) -> float:
        """Seconds since the trace began."""
        return round(time.perf_counter() - self._began, 6)

    def request(self, sequence: Sequence, *, awaited: bool) -> None:
        asked = sequence.request
        sampling = asked.sampling
        self._write(
            {
                "request": sequence.serial,
                "at": self.now(),
                "awaited": awaited,
                "prompt": list(asked.prompt_token_ids),
                "max_tokens": sampling.max_tokens,
                "template": asked.template,
                "priority": asked.priority,
                "deadline": asked.deadline,
                "drafter": asked.drafter,
                "greedy": sampling.greedy,
            }
        )

    def step(self, record: StepRecord) -> None:
        self._write({"step": record.at, **{name: value for name, value in asdict(record).items() if name != "at"}})

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        self._write({"end": sequence.serial, "at": self.now(), "reason": reason.value, "output": sequence.output.tolist()})

    def flush(self) -> None:
        self._file.flush()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")


def survivals(survival: NDArray[Any], drafted: NDArray[Any]) -> tuple[tuple[float, ...], ...]:
    """The first `drafted[s]` survivals of each row, to three digits: what a trace keeps of them."""
    return tuple(tuple(row[:count]) for row, count in zip(survival.round(3).tolist(), drafted.tolist(), strict=True))


def read_trace(path: Path) -> Trace:
    """Raises TraceError with the line that is wrong, OSError where the file cannot be read."""
    with path.open(encoding="utf-8") as file:
        trace: Trace | None = None
        for number, record in _records(path, file):
            try:
                if trace is None:
                    trace = Trace(_engine(record))
                else:
                    _add(trace, record)
            except (KeyError, TypeError, ValueError) as error:
                raise TraceError(f"{path}, line {number}: not a record of a version {VERSION} trace ({error!r})") from None
    if trace is None:
        raise TraceError(f"{path} is empty: the run that should have written it did not start")
    return trace


def _records(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            if not line.endswith("\n"):
                return  # the run was killed while it wrote its last record
            raise TraceError(f"{path}, line {number}: not JSON; a trace is what `longdraft run --trace` wrote") from None
        yield number, record


def _engine(record: dict[str, Any]) -> EngineRecord:
    if record.pop("trace") != VERSION:
        raise ValueError("it was written by another version of longdraft")
    record["profile"] = tuple((int(a), int(b), int(c), int(d), float(seconds)) for a, b, c, d, seconds in record["profile"])
    for text in record["experience"].values():
        Experience.from_json(text)  # what is wrong with it is said here, with the line
    return EngineRecord(**{**record, "members": tuple(record["members"])})


def _add(trace: Trace, record: dict[str, Any]) -> None:
    if "request" in record:
        record["prompt"] = tuple(record["prompt"])
        trace.requests.append(RequestRecord(number=record.pop("request"), **record))
    elif "end" in record:
        end = EndRecord(record["end"], record["at"], record["reason"], tuple(record["output"]))
        trace.ends[end.number] = end
    else:
        trace.steps.append(_step(record))


def _step(record: dict[str, Any]) -> StepRecord:
    values = {**record, "at": record["step"]}
    del values["step"]
    for name in ("drafted", "chosen", "accepted"):
        values[name] = tuple(values[name])
    values["survival"] = tuple(tuple(row) for row in values["survival"])
    values["groups"] = tuple((str(name), tuple(rows)) for name, rows in values["groups"])
    values["passes"] = tuple((str(name), int(requests), float(seconds)) for name, requests, seconds in values["passes"])
    return StepRecord(**values)
