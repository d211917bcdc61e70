"""Drafter checkpoints: which layout a folder has, whether it fits the target, and its weights."""

from __future__ import annotations

from engine.checkpoints.drafters.errors import DrafterError
from engine.checkpoints.drafters.folder import DrafterFolder, read_folder

__all__ = ["DrafterError", "DrafterFolder", "read_folder"]
