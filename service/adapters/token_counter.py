"""Counting prompt tokens without the engine: the tokenizer file of a model that is on this machine, read by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from service.config import ModelEntry

TOKENIZER = "tokenizer.json"


class LocalTokenizers:
    """`for_model(name)` gives a counter of text tokens, or None where the model's tokenizer is not here. Reads each file once."""

    def __init__(self, models: Mapping[str, ModelEntry], cache_dir: Path) -> None:
        self._models = models
        self._cache = cache_dir
        self._counters: dict[str, Callable[[str], int] | None] = {}

    def for_model(self, model: str) -> Callable[[str], int] | None:
        if model not in self._counters:
            self._counters[model] = self._load(model)
        return self._counters[model]

    def _load(self, model: str) -> Callable[[str], int] | None:
        entry = self._models.get(model)
        path = self._find(entry) if entry else None
        if path is None:
            return None
        try:
            from tokenizers import Tokenizer
        except ImportError:
            return None
        try:
            tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception:  # noqa: BLE001 - the library raises plain Exception for a file that it cannot read
            return None
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False))

    def _find(self, entry: ModelEntry) -> Path | None:
        """A folder is looked into; a packaged model lies under its name in the cache, its newest conversion last."""
        folder = Path(entry.source).expanduser()
        candidates = [folder / TOKENIZER] if folder.is_dir() else []
        if not candidates and "/" not in entry.source:
            candidates = sorted((self._cache / "models").glob(f"{entry.source}-*/{TOKENIZER}"))
        return candidates[-1] if candidates and candidates[-1].is_file() else None
