"""A drafter's folder: config.json, safetensors, and what Longdraft keeps beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoints.drafters.errors import DrafterError
from engine.checkpoints.drafters.formats import detect
from engine.checkpoints.tensors import read_tensors

if TYPE_CHECKING:
    import torch

CALIBRATION = "calibration.json"
RECORD = "longdraft_drafter.json"


@dataclass(frozen=True, slots=True)
class DrafterFolder:
    """config: as it stands. layout: of `formats.detect`. calibration and record are empty where the folder has none.

    record: name, target, tags, training history; `longdraft drafter train` and `pack` write it.
    """

    path: Path
    config: dict[str, Any]
    layout: str
    calibration: dict[str, Any]
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.record.get("name") or self.path.name)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, in memory: the files may be exchanged while an engine runs. Raises DrafterError where there are no safetensors."""
        try:
            return read_tensors(self.path, mapped=False)
        except ValueError as error:
            raise DrafterError(f"{self.path}: {error}") from error


def read_folder(path: Path) -> DrafterFolder:
    """Raises DrafterError for a folder that holds no drafter."""
    config = _json(path / "config.json")
    if config is None:
        raise DrafterError(f"{path} has no config.json, so it is no drafter's folder")
    try:
        layout = detect(config)
    except DrafterError as error:
        raise DrafterError(f"{path}: {error}") from error
    return DrafterFolder(path, config, layout, _json(path / CALIBRATION) or {}, _json(path / RECORD) or {})


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DrafterError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DrafterError(f"{path} must hold a JSON object")
    return value
