"""What tests of the stores put into the database, and threads that meet in it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from service.domain.account import File, FilePurpose
from service.domain.ids import new_batch_id, new_file_id
from service.domain.job import Batch
from service.ports import Database

AT = datetime(2030, 1, 1, tzinfo=UTC)


def a_file(project_id: str, **changes) -> File:
    file_id = new_file_id()
    return replace(File(file_id, project_id, FilePurpose.BATCH, "in.jsonl", 3, "00" * 32, f"files/{file_id}/in", AT), **changes)


def a_batch(project_id: str, file: File, **changes) -> Batch:
    batch = Batch(new_batch_id(), project_id, "/v1/chat/completions", "24h", AT, AT + timedelta(days=1), 1, input_file_id=file.id)
    return replace(batch, **changes)


def stored(db: Database, project_id: str, **changes) -> Batch:
    file = a_file(project_id)
    batch = a_batch(project_id, file, **changes)
    with db.begin() as uow:
        uow.files.add(file)
        uow.batches.add(batch)
    return batch


def together(*parts: Callable[[], None]) -> None:
    """Runs them in threads and passes on the first failure."""
    failed: list[BaseException] = []

    def guard(part: Callable[[], None]) -> None:
        try:
            part()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)

    threads = [threading.Thread(target=guard, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
