"""What a benchmark runs: the lines of a job, the configurations, and how often."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import orjson

from service.cli.bench.peers import PEERS
from service.cli.local_run import read_job
from service.cli.output import Failure
from service.config import EngineSettings, ModelEntry, Settings

Answer = tuple[str, int]
"""Text and number of generated tokens, end token included."""


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
    """`longdraft`, `bound`, or the name of a peer."""
    model: str
    entry: dict[str, Any]
    """The ModelEntry."""
    cache_dir: str
    dtype: str
    lines: Sequence[BenchLine]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Longdraft: EngineSettings. A peer: what its driver takes."""

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
    ours: tuple[Mapping[str, Any], ...]
    """Longdraft's configurations: what each changes in EngineSettings."""
    peers: tuple[str, ...]
    peer_drafts: bool
    """Also with the peers' own speculation."""
    contenders: bool
    """Peers that are clearly slower than the fastest are tried once, and stopped at twice its time; only the others are repeated."""
    batch_sizes: tuple[int, ...]
    repeats: int
    check: bool
    bound: bool
    peers_folder: Path

    @classmethod
    def of(
        cls,
        job: Path,
        *,
        settings: Settings,
        resolve_model: Callable[[str], str | None],
        dtype: str,
        configurations: Sequence[str],
        compare: Sequence[str],
        peer_drafts: bool,
        contenders: bool,
        batch_sizes: str,
        repeats: int,
        limit: int | None,
        check: bool,
        bound: bool,
        peers_folder: Path,
    ) -> Self:
        """Raises Failure where the job is not one clean job of one model, or an option names something unknown."""
        for peer in compare:
            if peer not in PEERS:
                raise Failure(f"--compare {peer} is not known; there are: {', '.join(PEERS)}.")
            if dtype != "float32" and peer != "transformers":
                raise Failure(f"--compare {peer} runs in float32 only; --dtype is {dtype}.")
        model, lines = _lines(job, settings, resolve_model)
        return cls(
            job=job.name,
            model=model,
            entry=settings.models[model],
            lines=tuple(lines[:limit]),
            settings=settings,
            dtype=dtype,
            ours=tuple(_configuration(text, settings.engine) for text in configurations),
            peers=tuple(compare),
            peer_drafts=peer_drafts,
            contenders=contenders,
            batch_sizes=_sizes(batch_sizes),
            repeats=repeats,
            check=check,
            bound=bound,
            peers_folder=peers_folder,
        )

    def task(self, kind: str, options: Mapping[str, Any] | None = None, *, dtype: str | None = None) -> Task:
        return Task(
            kind=kind,
            model=self.model,
            entry=self.entry.model_dump(mode="json"),
            cache_dir=str(self.settings.cache_dir),
            dtype=dtype or self.dtype,
            lines=self.lines,
            options=options or {},
        )

    def engine_options(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The operator's EngineSettings with a configuration's changes."""
        return {**self.settings.engine.model_dump(mode="json"), **changes}

    def digest(self, *more: object) -> str:
        """Names this job on this model: the key under which sweeps are kept."""
        return _digest([self.entry.model_dump(), [asdict(line) for line in self.lines], *map(str, more)])

    def model_digest(self, *more: object) -> str:
        """Names the model alone."""
        return _digest([self.entry.source, self.entry.revision, *map(str, more)])

    def line_digest(self, line: BenchLine) -> str:
        """Names a request by what decides its answer."""
        return _digest([line.endpoint, {name: value for name, value in line.body.items() if name != "model"}])


def _digest(content: Any) -> str:
    return hashlib.blake2b(orjson.dumps(content, option=orjson.OPT_SORT_KEYS), digest_size=12).hexdigest()


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


def _configuration(text: str, base: EngineSettings) -> Mapping[str, Any]:
    """`drafter=off,max_sequences=8` as values of EngineSettings."""
    changes: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in EngineSettings.model_fields:
            raise Failure(f"--config takes NAME=VALUE,...; names are {', '.join(EngineSettings.model_fields)}; got {part!r}.")
        changes[name] = value
    try:
        checked = EngineSettings(**{**base.model_dump(), **changes}).model_dump(mode="json")
    except ValueError as error:
        raise Failure(f"--config {text}: {error}") from None
    return {name: checked[name] for name in changes}


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(sorted({int(size) for size in text.split(",")}))
    except ValueError:
        sizes = ()
    if not sizes or sizes[0] < 1:
        raise Failure(f"--batch-sizes takes whole numbers from 1 up, separated by commas (8,16,32), got {text!r}.")
    return sizes
