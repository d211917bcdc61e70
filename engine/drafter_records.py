"""Files in which the experience with drafters outlasts an engine: one a drafter, model, device and versions."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from engine.speculation.experience import Experience

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)


class DrafterRecords:
    """In `directory`. about: the model, the device, and whatever else times and rates depend on. stamp: differs for a drafter, by name,
    once its weights were exchanged.

    Several engines may keep theirs at once: a file is whole, and the last one's. A file that cannot be read is as if there were none.
    """

    def __init__(self, directory: Path, about: list[str], stamp: Callable[[str], tuple[object, ...]]) -> None:
        self._directory = directory
        self._about = about
        self._stamp = stamp

    def recall(self, name: str) -> Experience | None:
        """See `Records`."""
        path = self._path(name)
        try:
            return Experience.from_json(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.warning("what was learned of the drafter %s in earlier jobs cannot be used (%s): %s", name, path, error)
            return None

    def keep(self, name: str, experience: Experience) -> None:
        """See `Records`."""
        path, written = self._path(name), None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            handle, written = tempfile.mkstemp(prefix=f".{path.name}-", dir=self._directory)
            with os.fdopen(handle, "w") as file:
                file.write(experience.to_json())
            Path(written).replace(path)
        except OSError as error:
            _log.warning("what was learned of the drafter %s cannot be kept (%s): %s", name, path, error)
            if written is not None:
                Path(written).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        key = hashlib.sha256(json.dumps([*self._about, name, self._stamp(name)]).encode()).hexdigest()[:16]
        return self._directory / f"{name.replace('/', '--')}-{key}.json"
