"""Counting prompt tokens without a loaded engine: with the tokenizer and the chat template of a model that is on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from engine.tokenizer import read_tokenizer
from service.adapters.prompts import encode_prompts
from service.config import ModelEntry
from service.domain.request_body import GenerationRequest

TOKENIZER = "tokenizer.json"

CountTokens = Callable[[GenerationRequest], int]


class LocalTokenizers:
    """`for_model(name)` gives what counts the prompt tokens of a line, or None where the model's tokenizer is not here. Reads each once."""

    def __init__(self, models: Mapping[str, ModelEntry], cache_dir: Path) -> None:
        self._models = models
        self._cache = cache_dir
        self._counters: dict[str, CountTokens | None] = {}

    def for_model(self, model: str) -> CountTokens | None:
        if model not in self._counters:
            self._counters[model] = self._load(model)
        return self._counters[model]

    def _load(self, model: str) -> CountTokens | None:
        entry = self._models.get(model)
        folder = self._find(entry) if entry else None
        if folder is None:
            return None
        try:
            tokenizer = read_tokenizer(folder)
        except Exception:  # noqa: BLE001 - the libraries are not installed, or raise plain Exception for a file that they cannot read
            return None
        return lambda asked: sum(len(prompt.tokens) for prompt in encode_prompts(tokenizer, asked))

    def _find(self, entry: ModelEntry) -> Path | None:
        """A folder is looked into; a packaged model lies under its name in the cache, its newest conversion last."""
        folder = Path(entry.source).expanduser()
        candidates = [folder] if folder.is_dir() else []
        if not candidates and "/" not in entry.source:
            candidates = sorted((self._cache / "models").glob(f"{entry.source}-*"))
        return candidates[-1] if candidates and (candidates[-1] / TOKENIZER).is_file() else None
