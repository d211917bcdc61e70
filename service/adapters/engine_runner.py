"""The InferenceRunner over the engine: request bodies in, OpenAI's response bodies out. The only adapter that imports torch."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.checkpoints import LoadedModel, fetch, load_model
from engine.config import EngineConfig
from engine.drafters import registry
from engine.engine import Engine
from engine.types import FinishReason, Request, Result, SamplingParams, TokenLedger
from service.adapters.engine_options import kv_budget
from service.config import EngineSettings, ModelEntry
from service.domain.line import LineOutcome, LineWork, Outcome
from service.domain.request_body import CHAT, GenerationRequest, LineRejected, parse_body
from service.domain.response_body import chat_completion_body, completion_body, completion_id
from service.domain.usage import Usage, Work
from service.errors import ModelUnavailable
from service.ports import RunnerStats

_TEMPLATE_CHARACTERS = 64
"""Lines whose prompts begin alike this far were written from one pattern, as far as drafting and length statistics care."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    name: str
    engine: Engine
    fingerprint: str


def checkpoint_folder(entry: ModelEntry, cache_dir: Path, progress: Callable[[str], None] | None = None) -> Path:
    """The local folder of a registered model, in Hugging Face's layout, fetched and converted first if need be.

    Raises ModelUnavailable with the reason.
    """
    try:
        return fetch(entry.source, revision=entry.revision, cache_dir=cache_dir, progress=progress).directory
    except (ValueError, OSError) as error:
        raise ModelUnavailable(f"The model {entry.source!r} cannot be fetched: {error}") from error


class EngineRunner:
    """Runs lines on one model at a time. `run` belongs to one thread; `abort` and `stats` may be called from any."""

    def __init__(self, models: Mapping[str, ModelEntry], settings: EngineSettings, cache_dir: Path) -> None:
        self._models = models
        self._settings = settings
        self._cache_dir = cache_dir
        self._loaded: _Loaded | None = None
        self._load_ns = 0
        self._profile_ns = 0
        self._busy_ns_before = 0
        """Of the engines that were unloaded."""

    def load(self, model: str) -> None:
        """Makes `model` the loaded one. Raises ModelUnavailable with the reason; nothing is loaded then."""
        if self._loaded is not None and self._loaded.name == model:
            return
        entry = self._models.get(model)
        if entry is None:
            raise ModelUnavailable(f"No model is registered as {model!r}; known: {', '.join(self._models)}.")
        self.close()
        started = time.perf_counter_ns()
        config = self._config(entry)
        loaded = _load_checkpoint(model, entry, config, self._cache_dir)
        weights_ready = time.perf_counter_ns()
        try:
            engine = Engine(loaded, config)  # sizes the KV cache and measures how long steps take here
        except (ValueError, MemoryError) as error:
            raise ModelUnavailable(f"The model {model!r} does not run here: {error}.") from error
        self._load_ns += weights_ready - started
        self._profile_ns += time.perf_counter_ns() - weights_ready
        self._loaded = _Loaded(model, engine, _fingerprint(engine))

    def run(self, lines: Iterable[LineWork | None]) -> Iterator[LineOutcome]:
        """Outcomes as lines finish. A body that cannot be run is REJECTED with OpenAI's 400; the others go on."""
        if self._loaded is None:
            raise RuntimeError("load() comes before run()")
        feed = _Feed(self._loaded, iter(lines))
        while not feed.exhausted:
            for result in self._loaded.engine.run(feed):
                if (outcome := feed.outcome(result)) is not None:
                    yield outcome
                yield from feed.take_rejected()
            yield from feed.take_rejected()

    def abort(self, keys: Collection[tuple[str, int]]) -> None:
        if self._loaded is not None:
            self._loaded.engine.abort(_request_id(key) for key in keys)

    def stats(self) -> RunnerStats:
        loaded = self._loaded
        if loaded is None:
            return RunnerStats(busy_ns=self._busy_ns_before, load_ns=self._load_ns, profile_ns=self._profile_ns)
        now = loaded.engine.stats()
        return RunnerStats(
            tokens_per_second=now.tokens_per_second if now.running else 0.0,
            acceptance_length=now.acceptance_length,
            running=now.running,
            waiting=now.waiting,
            busy_ns=self._busy_ns_before + now.busy_ns,
            load_ns=self._load_ns,
            profile_ns=self._profile_ns,
            context=_context(loaded.engine),
        )

    @property
    def capacity(self) -> int:
        if self._loaded is None:
            return 64
        engine = self._loaded.engine
        return engine.limits.max_sequences + engine.config.look_ahead

    @property
    def device(self) -> str:
        import torch

        if self._settings.device == "auto":
            return f"cuda ({torch.cuda.get_device_name(0)})" if torch.cuda.is_available() else "cpu"
        return self._settings.device

    def close(self) -> None:
        """Unloads the model and gives its memory back."""
        if self._loaded is None:
            return
        import torch

        self._busy_ns_before += self._loaded.engine.stats().busy_ns
        self._loaded = None
        gc.collect()  # the engine's parts refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _config(self, entry: ModelEntry) -> EngineConfig:
        chosen = self._settings
        kv_bytes, kv_fraction = kv_budget(chosen.kv_memory)
        return EngineConfig(
            dtype=entry.dtype or chosen.dtype,
            device=chosen.device,
            kv_bytes=kv_bytes,
            kv_fraction=kv_fraction,
            drafter=chosen.drafter,
            max_sequences=chosen.max_sequences,
            threads=chosen.threads,
        )


class _Feed:
    """The engine's requests, made from lines as the engine pulls them, and the way back from its results.

    A rejected line never reaches the engine, and the engine yields only what it ran. So when nothing is running the feed pauses (ends the
    engine's run) to let rejections out: whoever feeds us may be waiting for exactly those.
    """

    def __init__(self, loaded: _Loaded, lines: Iterator[LineWork | None]) -> None:
        self._loaded = loaded
        self._lines = lines
        self._running: dict[str, tuple[LineWork, GenerationRequest]] = {}
        self._rejected: list[LineOutcome] = []
        self.exhausted = False

    def __iter__(self) -> Iterator[Request | None]:
        while self._running or not self._rejected:
            try:
                line = next(self._lines)
            except StopIteration:
                self.exhausted = True
                return
            if line is None:
                yield None
            elif (request := self._admit(line)) is not None:
                yield request

    def take_rejected(self) -> list[LineOutcome]:
        rejected, self._rejected = self._rejected, []
        return rejected

    def outcome(self, result: Result) -> LineOutcome | None:
        """None for an aborted request: nobody wants it any more."""
        line, asked = self._running.pop(result.id)
        if result.finish_reason is FinishReason.ABORTED:
            return None
        work = _work(result.ledger)
        if result.finish_reason is FinishReason.ERROR:
            message = result.error or "the engine gave no reason"
            return _outcome(line, Outcome.FAILED, error_code="engine_error", error_message=message, work=work)
        usage = Usage(input_tokens=result.ledger.prompt, cached_tokens=result.ledger.cached, output_tokens=result.ledger.generated)
        build = chat_completion_body if asked.endpoint == CHAT else completion_body
        body = build(
            id=completion_id(line.endpoint, line.batch_id, line.line_no),
            created=int(time.time()),
            model=self._loaded.name,
            text=result.text,
            finish_reason=result.finish_reason.value,
            usage=usage,
            system_fingerprint=f"{self._loaded.fingerprint}-{result.drafter or registry.OFF}",
        )
        return _outcome(line, Outcome.SUCCEEDED, status_code=200, body=body, usage=usage, work=work, drafter=result.drafter)

    def _admit(self, line: LineWork) -> Request | None:
        try:
            asked = parse_body(line.endpoint, line.body)
            request = _request(self._loaded.engine, line, asked)
        except LineRejected as refusal:
            self._rejected.append(_outcome(line, Outcome.REJECTED, status_code=refusal.status, body=refusal.body))
            return None
        self._running[request.id] = (line, asked)
        return request


def _request(engine: Engine, line: LineWork, asked: GenerationRequest) -> Request:
    """Raises LineRejected where the model cannot take it: no chat template, foreign tokens, a context that is too long."""
    prompt = _encode(engine, asked)
    sampling = SamplingParams(
        max_tokens=_room(engine, asked, len(prompt)),
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        seed=asked.seed,
        stop=asked.stop,
    )
    try:
        registry.resolve(line.drafter, engine.config.drafter)
    except registry.UnknownDrafterError as error:
        raise LineRejected(f"{error}.", param="drafter", code="unsupported_value") from None
    return Request(
        id=_request_id(line.key),
        prompt_token_ids=prompt,
        sampling=sampling,
        template=line.template or _template(asked),
        priority=line.priority,
        deadline=line.deadline,
        drafter=line.drafter,
    )


def _encode(engine: Engine, asked: GenerationRequest) -> tuple[int, ...]:
    tokenizer = engine.tokenizer
    if asked.messages is not None:
        try:
            return tokenizer.encode_chat(asked.template_input)
        except Exception as error:  # noqa: BLE001 - a chat template is a program that came with the model; it may raise anything
            raise LineRejected(
                f"The model's chat template refuses these messages: {error}", param="messages", code="invalid_value"
            ) from None
    if isinstance(asked.prompt, tuple):
        largest = engine.spec.vocab_size - 1
        if (highest := max(asked.prompt)) > largest:
            raise LineRejected(f"Invalid 'prompt': token {highest}; this model's are 0 to {largest}.", param="prompt", code="invalid_value")
        return asked.prompt
    assert asked.prompt is not None
    return tokenizer.encode(asked.prompt)


def _room(engine: Engine, asked: GenerationRequest, prompt_tokens: int) -> int:
    """How many tokens the answer may have: what was asked for, else what is left. Raises LineRejected where that does not fit."""
    param = "prompt" if asked.messages is None else "messages"
    if prompt_tokens == 0:
        raise LineRejected(f"Invalid '{param}': it has no tokens.", param=param, code="invalid_value")
    limit = _context(engine)
    why = "this model's maximum context length" if limit == engine.spec.max_positions else "what this worker's KV cache holds"
    wanted = asked.max_tokens if asked.max_tokens is not None else 1
    if prompt_tokens + wanted > limit:
        raise LineRejected(
            f"{limit} tokens are {why}; you asked for {prompt_tokens + wanted}: {prompt_tokens} in '{param}' and {wanted} for the answer. "
            f"Shorten '{param}'{' or lower max_tokens' if asked.max_tokens else ''}.",
            param=param if prompt_tokens >= limit or asked.max_tokens is None else "max_tokens",
            code="context_length_exceeded",
        )
    return asked.max_tokens if asked.max_tokens is not None else limit - prompt_tokens


def _context(engine: Engine) -> int:
    """Tokens that a prompt and its answer may have together: what the model knows, or what the KV cache holds."""
    return min(engine.spec.max_positions, engine.limits.num_blocks * engine.config.block_size)


def _template(asked: GenerationRequest) -> str:
    start = asked.messages[0].content if asked.messages else asked.prompt
    return hashlib.blake2b(repr(start[:_TEMPLATE_CHARACTERS] if start else "").encode(), digest_size=8).hexdigest()


def _outcome(line: LineWork, outcome: Outcome, **values: Any) -> LineOutcome:
    return LineOutcome(line.batch_id, line.line_no, line.group_id, line.custom_id, outcome, **values)


_SHARED_COUNTERS = tuple({f.name for f in fields(Work)} & {f.name for f in fields(TokenLedger)})


def _work(ledger: TokenLedger) -> Work:
    return Work(**{name: getattr(ledger, name) for name in _SHARED_COUNTERS})


def _request_id(key: tuple[str, int]) -> str:
    return f"{key[0]}:{key[1]}"


def _load_checkpoint(model: str, entry: ModelEntry, config: EngineConfig, cache_dir: Path) -> LoadedModel:
    try:
        return load_model(entry.source, dtype=config.dtype, device=config.device, revision=entry.revision, cache_dir=cache_dir)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise ModelUnavailable(f"The model {model!r} ({entry.source}) cannot be loaded: {error}") from error


def _fingerprint(engine: Engine) -> str:
    """Names what decides an answer besides the request: engine version, number format, weights."""
    dtype = str(engine.spec.dtype).removeprefix("torch.")
    revision = hashlib.blake2b(f"{engine.spec.name}@{engine.spec.revision}".encode(), digest_size=4).hexdigest()
    return f"ld-{version('longdraft')}-{dtype}-{revision}"
