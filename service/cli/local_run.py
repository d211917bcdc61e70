"""`longdraft run`: one job in this process, without any service. The same checks, the same lines out."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import orjson

from service.cli.batch_cmds import endpoint_of, errors_path
from service.cli.output import Failure
from service.domain.ids import new_batch_id
from service.domain.job import InputError
from service.domain.line import LineOutcome, LineWork, Outcome, StagedLine
from service.domain.result_lines import encode_result
from service.domain.usage import Usage, Work
from service.planning.validate import InputRefused, LineRules, check_lines, duplicate_error
from service.ports import InferenceRunner
from service.usecases.validate import READ_BYTES, refusal


@dataclass(frozen=True, slots=True)
class Place:
    """Where a line lies in the input."""

    line_no: int
    offset: int
    length: int
    custom_id: str


@dataclass(slots=True)
class Job:
    """A checked input: the lines to run, by model, and the refusals. A few hundred bytes a line, whatever the lines hold."""

    endpoint: str
    total: int = 0
    by_model: dict[str, list[Place]] = field(default_factory=dict)
    refused: list[tuple[StagedLine, InputError]] = field(default_factory=list)


@dataclass(slots=True)
class Tally:
    """What a run has done so far; read by the progress display."""

    completed: int = 0
    failed: int = 0
    usage: Usage = field(default_factory=Usage)
    work: Work = field(default_factory=Work)
    seconds: float = 0.0
    load_seconds: float = 0.0

    def add(self, outcome: LineOutcome) -> None:
        succeeded = outcome.outcome is Outcome.SUCCEEDED
        self.completed += succeeded
        self.failed += not succeeded
        self.usage += outcome.usage
        self.work += outcome.work

    @property
    def acceptance_length(self) -> float | None:
        return self.work.sampled / self.work.steps if self.work.steps else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.usage.output_tokens / self.seconds if self.seconds else None


def read_job(path: Path, resolve_model: Callable[[str], str | None], *, max_line_bytes: int, max_json_depth: int) -> Job:
    """Checks every line as the service does. One process has no limit on the number of lines.

    Raises Failure for a file that cannot be read or holds no requests.
    """
    job = Job(endpoint_of(path))
    rules = LineRules(job.endpoint, lru_cache(256)(resolve_model), 2**62, max_line_bytes, max_json_depth)
    first_use: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for line in check_lines(iter(lambda: file.read(READ_BYTES), b""), rules):
                job.total += 1
                error = line.error or _repeated(first_use, line.staged)
                if error is not None:
                    job.refused.append((line.staged, error))
                    continue
                assert line.staged.model is not None
                assert line.staged.custom_id is not None
                place = Place(line.staged.line_no, line.staged.offset, line.staged.length, line.staged.custom_id)
                job.by_model.setdefault(line.staged.model, []).append(place)
    except OSError as problem:
        raise Failure(f"Cannot read {path}: {problem.strerror or problem}.") from None
    except InputRefused as refused:
        raise Failure(f"{path}: {refused.error.message}") from None
    return job


def run_job(job: Job, source: Path, output: Path, runner: InferenceRunner, *, drafter: str, tick: Callable[[Tally], None]) -> Tally:
    """Runs the lines and writes OUT and OUT.errors, both in input order. `tick` is called after every line.

    Interrupted by Ctrl-C, the finished lines are written all the same, and the others go to the error file. Then the interrupt goes on.
    """
    batch_id, tally = new_batch_id(), Tally()
    with tempfile.TemporaryFile(dir=output.parent) as scratch, source.open("rb") as file:
        spool = Spool(scratch)

        def deliver(outcome: LineOutcome) -> None:
            spool.add(outcome)
            tally.add(outcome)
            tick(tally)

        for staged, error in job.refused:
            deliver(refusal(batch_id, staged, error))
        interrupt = None
        try:
            for model, places in job.by_model.items():
                _run_model(model, places, batch_id, job.endpoint, file, runner, drafter, tally, deliver)
        except KeyboardInterrupt as stopped:
            interrupt = stopped
            _give_up(job, batch_id, spool, deliver)
        spool.write(output, errors_path(output))
    if interrupt is not None:
        raise interrupt
    return tally


def _run_model(
    model: str,
    places: Sequence[Place],
    batch_id: str,
    endpoint: str,
    file: BinaryIO,
    runner: InferenceRunner,
    drafter: str,
    tally: Tally,
    deliver: Callable[[LineOutcome], None],
) -> None:
    started = time.perf_counter()
    runner.load(model)
    loaded = time.perf_counter()
    tally.load_seconds += loaded - started
    before = tally.seconds

    def lines() -> Iterator[LineWork]:
        for place in places:
            file.seek(place.offset)
            body = orjson.loads(file.read(place.length))["body"]
            yield LineWork(batch_id, place.line_no, 0, place.custom_id, model, endpoint, body, drafter=drafter)

    for outcome in runner.run(lines()):
        tally.seconds = before + time.perf_counter() - loaded
        deliver(outcome)


def _give_up(job: Job, batch_id: str, spool: Spool, deliver: Callable[[LineOutcome], None]) -> None:
    for places in job.by_model.values():
        for place in places:
            if place.line_no not in spool:
                unfinished = LineOutcome(
                    batch_id,
                    place.line_no,
                    None,
                    place.custom_id,
                    Outcome.FAILED,
                    error_code="batch_cancelled",
                    error_message="The run was interrupted before this line was finished.",
                )
                deliver(unfinished)


class Spool:
    """Result lines as they finish, on disk; written out in input order at the end."""

    def __init__(self, scratch: BinaryIO) -> None:
        self._scratch = scratch
        self._places: dict[int, tuple[int, int, bool]] = {}

    def __contains__(self, line_no: int) -> bool:
        return line_no in self._places

    def add(self, outcome: LineOutcome) -> None:
        data = encode_result(outcome)
        self._places[outcome.line_no] = (self._scratch.seek(0, 2), len(data), outcome.outcome is Outcome.SUCCEEDED)
        self._scratch.write(data)

    def write(self, output: Path, errors: Path) -> None:
        """Both files, each whole or not at all. The output always exists afterwards; an error file only if a line failed."""
        _write(output, self._in_order(succeeded=True))
        errors.unlink(missing_ok=True)  # of an earlier run
        if any(not succeeded for _, _, succeeded in self._places.values()):
            _write(errors, self._in_order(succeeded=False))

    def _in_order(self, *, succeeded: bool) -> Iterator[bytes]:
        for _, (offset, length, good) in sorted(self._places.items()):
            if good == succeeded:
                self._scratch.seek(offset)
                yield self._scratch.read(length)


def _write(path: Path, lines: Iterator[bytes]) -> None:
    partial = path.with_name(f"{path.name}.part")
    try:
        with partial.open("wb") as file:
            file.writelines(lines)
        shutil.move(partial, path)
    except OSError as error:
        raise Failure(f"Cannot write {path}: {error.strerror or error}.") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _repeated(first_use: dict[str, int], line: StagedLine) -> InputError | None:
    assert line.custom_id is not None
    first = first_use.setdefault(line.custom_id, line.line_no)
    return duplicate_error(line.line_no, first, line.custom_id) if first != line.line_no else None
