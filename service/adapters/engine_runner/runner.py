"""The runner itself: loads models, drives the engine, reports what it is doing."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from engine.checkpoints import LoadedModel, fetch, load_model
from engine.checkpoints.cache import SharedFolders
from engine.config import EngineConfig
from engine.drafters.builtin import OFF
from engine.engine import Engine
from engine.profile import Profiles
from service.adapters.engine_options import kv_budget
from service.adapters.engine_runner.feed import Feed, Loaded
from service.adapters.engine_runner.requests import context_of, request_id
from service.config import EngineSettings, ModelEntry
from service.domain.line import LineOutcome, LineWork
from service.domain.response_body import Made
from service.errors import ModelUnavailable
from service.ports import RunnerStats


def checkpoint_folder(
    entry: ModelEntry, cache_dir: Path, progress: Callable[[str], None] | None = None, shared: SharedFolders | None = None
) -> Path:
    """The local folder of a registered model, in Hugging Face's layout, fetched and converted first if need be.

    Raises ModelUnavailable with the reason.
    """
    try:
        return fetch(entry.source, revision=entry.revision, cache_dir=cache_dir, shared=shared, progress=progress).directory
    except (ValueError, OSError) as error:
        raise ModelUnavailable(f"The model {entry.source!r} cannot be fetched: {error}", lasting=isinstance(error, ValueError)) from error


class EngineRunner:
    """Runs lines on one model at a time. `run` belongs to one thread; `abort` and `stats` may be called from any."""

    def __init__(
        self, models: Mapping[str, ModelEntry], settings: EngineSettings, cache_dir: Path, shared: SharedFolders | None = None
    ) -> None:
        self._models = models
        self._settings = settings
        self._cache_dir = cache_dir
        self._shared = shared
        self._loaded: Loaded | None = None
        self._feed: Feed | None = None
        self._load_ns = 0
        self._profile_ns = 0
        self._busy_ns_before = 0
        self._steps_before = 0
        """Both of the engines that were unloaded."""

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
        loaded = _load_checkpoint(model, entry, config, self._cache_dir, self._shared)
        weights_ready = time.perf_counter_ns()
        try:
            # Sizes the KV cache and measures how long steps take here, if that is not known yet.
            engine = Engine(loaded, config, Profiles(self._cache_dir, self._shared))
        except (ValueError, MemoryError) as error:
            raise ModelUnavailable(f"The model {model!r} does not run here: {error}.") from error
        self._load_ns += weights_ready - started
        self._profile_ns += time.perf_counter_ns() - weights_ready
        self._loaded = Loaded(model, engine, _made(model, engine))

    def run(self, lines: Iterable[LineWork | None]) -> Iterator[LineOutcome]:
        """Outcomes as lines finish. A body that cannot be run is REJECTED with OpenAI's 400; the others go on."""
        if self._loaded is None:
            raise RuntimeError("load() comes before run()")
        feed = self._feed = Feed(self._loaded, iter(lines))
        while not feed.exhausted:
            for result in self._loaded.engine.run(feed):
                if (outcome := feed.outcome(result)) is not None:
                    yield outcome
                yield from feed.take_rejected()
            yield from feed.take_rejected()

    def recall(self, answers: Iterable[str]) -> None:
        """Finished answers of the batch draft for its other lines. Does nothing before `load`."""
        if self._loaded is not None:
            engine = self._loaded.engine
            for text in answers:
                engine.observe_finished(None, list(engine.tokenizer.hf.encode(text, add_special_tokens=False)))

    def abort(self, keys: Collection[tuple[str, int]]) -> None:
        if self._feed is not None:
            self._feed.abort(keys)
        if self._loaded is not None:
            self._loaded.engine.abort(request_id(key) for key in keys)

    def stats(self) -> RunnerStats:
        loaded = self._loaded
        if loaded is None:
            return RunnerStats(busy_ns=self._busy_ns_before, steps=self._steps_before, load_ns=self._load_ns, profile_ns=self._profile_ns)
        now = loaded.engine.stats()
        return RunnerStats(
            tokens_per_second=now.tokens_per_second if now.running else 0.0,
            acceptance_length=now.acceptance_length,
            running=now.running,
            waiting=now.waiting,
            busy_ns=self._busy_ns_before + now.busy_ns,
            load_ns=self._load_ns,
            profile_ns=self._profile_ns,
            profile_reused=loaded.engine.profile_reused,
            first_token_ns=now.first_token_ns,
            steps=self._steps_before + now.steps,
            kv_usage=now.kv_usage,
            kv_bytes=now.kv_blocks * loaded.engine.limits.block_bytes,
            kv_peak_bytes=now.kv_blocks_peak * loaded.engine.limits.block_bytes,
            context=context_of(loaded.engine),
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

        stats = self._loaded.engine.stats()
        self._busy_ns_before += stats.busy_ns
        self._steps_before += stats.steps
        self._loaded = self._feed = None
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
            kv_dtype=chosen.kv_dtype,
            drafter=chosen.drafter,
            max_sequences=chosen.max_sequences,
            threads=chosen.threads,
            fixed_drafts=chosen.fixed_drafts,
            trace=chosen.trace,
            adapt=chosen.adapt,
        )


def _load_checkpoint(model: str, entry: ModelEntry, config: EngineConfig, cache_dir: Path, shared: SharedFolders | None) -> LoadedModel:
    try:
        return load_model(
            entry.source, dtype=config.dtype, device=config.device, revision=entry.revision, cache_dir=cache_dir, shared=shared
        )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        message = f"The model {model!r} ({entry.source}) cannot be loaded: {error}"
        raise ModelUnavailable(message, lasting=not isinstance(error, OSError)) from error


def _made(model: str, engine: Engine) -> Made:
    """What decides an answer besides the request: weights, number format, engine version."""
    spec = engine.spec
    dtype = spec.precision + ("" if engine.config.kv_dtype == "auto" else f"+{engine.config.kv_dtype}-kv")
    return Made(model, f"{spec.name}@{spec.revision}", dtype, version("longdraft"), OFF)
