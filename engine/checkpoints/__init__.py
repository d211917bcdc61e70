"""Finding, fetching, checking and loading target models."""

from __future__ import annotations

from engine.checkpoints.loader import LoadedModel, load_model
from engine.checkpoints.packaged import DEFAULT_MODEL, PACKAGED
from engine.checkpoints.sources import default_cache_dir, fetch

__all__ = ["DEFAULT_MODEL", "PACKAGED", "LoadedModel", "default_cache_dir", "fetch", "load_model"]
