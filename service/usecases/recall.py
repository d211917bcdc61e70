"""What a worker reads again of a batch that is new to it: answers delivered already, by itself before a restart or by others.

They draft for the lines that are left; losing them would cost speed and nothing else, so an outage here is only noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import structlog

from service.errors import LongdraftError
from service.ports import BlobStore, Database, InferenceRunner, Recalls
from service.usecases.results import read_lines

RECALLED = 256
"""Delivered lines of a batch that are read again; whole commits."""

log = structlog.get_logger(__name__)


class Recall:
    """Belongs to the runner's thread. A batch is recalled once for each time a model is loaded."""

    def __init__(self, database: Database, blobs: BlobStore, runner: InferenceRunner) -> None:
        self._database = database
        self._blobs = blobs
        self._runner = runner
        self._met: set[str] = set()

    def forget(self) -> None:
        """Another model is loaded: it knows nothing yet."""
        self._met.clear()

    def meet(self, batch_ids: set[str]) -> None:
        """Lets the runner see what is delivered of the batches that are new here."""
        if not isinstance(self._runner, Recalls):
            return
        for batch_id in sorted(batch_ids - self._met):
            self._met.add(batch_id)
            try:
                self._runner.recall(self._answers(batch_id))
            except (LongdraftError, OSError) as problem:
                log.warning("not_recalled", batch_id=batch_id, error=str(problem))

    def _answers(self, batch_id: str) -> Iterator[str]:
        with self._database.begin() as uow:
            results = uow.results.after(batch_id, 0, RECALLED)
        for line in read_lines(self._blobs, results):
            if (text := _text(orjson.loads(line))) is not None:
                yield text


def _text(line: dict[str, Any]) -> str | None:
    """The first choice's text; None for a line that failed."""
    choices = ((line.get("response") or {}).get("body") or {}).get("choices")
    if not choices:
        return None
    text = choices[0].get("text", (choices[0].get("message") or {}).get("content"))
    return text if isinstance(text, str) else None
