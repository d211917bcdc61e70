"""What the engine knows of models without loading them."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoints import PACKAGED
from engine.checkpoints.model_config import runs_on
from engine.checkpoints.sources import find
from service.config import ModelEntry


def is_packaged(entry: ModelEntry) -> bool:
    """Whether the model comes from a package index, by its own name."""
    return entry.source in PACKAGED


def look(entry: ModelEntry, cache_dir: Path) -> tuple[Path | None, str | None]:
    """(the local folder, what runs it), or None for both where the model would have to be fetched or converted first."""
    folder = find(entry.source, revision=entry.revision, cache_dir=cache_dir)
    return folder, None if folder is None else runs_on(folder)
