"""What a benchmark runs: the lines of a job, the configurations, and how often."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import orjson

from service.cli.local_run import read_job
from service.cli.output import Failure
from service.config import ModelEntry, Settings

PEERS = ("transformers",)


@dataclass(frozen=True, slots=True)
class BenchLine:
    """One request. The body asks for temperature 0: only then can answers be compared."""

    line_no: int
    custom_id: str
    endpoint: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """One run of one configuration, as it is handed to the process that does it."""

    kind: str
    """`longdraft` or `transformers`."""
    model: str
    entry: dict[str, Any]
    """The ModelEntry."""
    cache_dir: str
    dtype: str
    lines: Sequence[BenchLine]
    drafter: str = "auto"
    max_sequences: int | None = None
    batch_size: int = 1
    engine: Mapping[str, Any] | None = None
    """The operator's EngineSettings."""

    def encode(self) -> bytes:
        return orjson.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        values = orjson.loads(data)
        return cls(**{**values, "lines": [BenchLine(**line) for line in values["lines"]]})


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """Everything the command line asked for, checked."""

    job: str
    model: str
    entry: ModelEntry
    lines: tuple[BenchLine, ...]
    settings: Settings
    dtype: str
    drafters: tuple[str, ...]
    peers: tuple[str, ...]
    max_sequences: int | None
    batch_sizes: tuple[int, ...]
    repeats: int
    check: bool

    @classmethod
    def of(
        cls,
        job: Path,
        *,
        settings: Settings,
        resolve_model: Callable[[str], str | None],
        dtype: str,
        drafters: Sequence[str],
        compare: Sequence[str],
        max_sequences: int | None,
        batch_sizes: str,
        repeats: int,
        limit: int | None,
        check: bool,
    ) -> Self:
        """Raises Failure where the job is not one clean job of one model, or an option names something unknown."""
        for peer in compare:
            if peer not in PEERS:
                raise Failure(f"--compare {peer} is not known; there is: {', '.join(PEERS)}.")
        model, lines = _lines(job, settings, resolve_model)
        return cls(
            job=job.name,
            model=model,
            entry=settings.models[model],
            lines=tuple(lines[:limit]),
            settings=settings,
            dtype=dtype,
            drafters=tuple(drafters),
            peers=tuple(compare),
            max_sequences=max_sequences,
            batch_sizes=_sizes(batch_sizes),
            repeats=repeats,
            check=check,
        )

    def task(self, kind: str, **options: Any) -> Task:
        return Task(
            kind=kind,
            model=self.model,
            entry=self.entry.model_dump(mode="json"),
            cache_dir=str(self.settings.cache_dir),
            lines=self.lines,
            engine=self.settings.engine.model_dump(),
            **{"dtype": self.dtype, **options},
        )

    def digest(self, *more: object) -> str:
        """Names this job on this model: the key under which reference answers and sweeps are kept."""
        content = orjson.dumps([self.entry.model_dump(), [asdict(line) for line in self.lines], *map(str, more)])
        return hashlib.blake2b(content, digest_size=12).hexdigest()


def _lines(job: Path, settings: Settings, resolve_model: Callable[[str], str | None]) -> tuple[str, list[BenchLine]]:
    limits = settings.limits
    plan = read_job(job, resolve_model, max_line_bytes=limits.max_line_bytes, max_json_depth=limits.max_json_depth)
    if plan.refused:
        staged, error = plan.refused[0]
        raise Failure(f"{job}, line {staged.line_no}: {error.message} A benchmark needs a job without bad lines.")
    if len(plan.by_model) != 1:
        raise Failure(f"{job} names {len(plan.by_model)} models ({', '.join(plan.by_model)}); choose one with --model.")
    ((model, places),) = plan.by_model.items()
    lines = []
    with job.open("rb") as file:
        for place in places:
            file.seek(place.offset)
            body = orjson.loads(file.read(place.length))["body"]
            lines.append(BenchLine(place.line_no, place.custom_id, plan.endpoint, {**body, "model": model, "temperature": 0}))
    return model, lines


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(sorted({int(size) for size in text.split(",")}))
    except ValueError:
        sizes = ()
    if not sizes or sizes[0] < 1:
        raise Failure(f"--batch-sizes takes whole numbers from 1 up, separated by commas (8,16,32), got {text!r}.")
    return sizes
