"""Files on PostgreSQL: owners, cursors, and objects that nobody reads any more."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from service.domain.account import FilePurpose
from service.domain.job import BatchStatus
from service.errors import InvalidRequest
from service.ports import Database
from tests.integration.stored import a_file, stored


def test_files_of_others_and_files_that_are_gone_look_alike(db: Database, project: str) -> None:
    mine, deleted, expired = a_file(project), a_file(project), a_file(project, expires_at=datetime(2020, 1, 1, tzinfo=UTC))
    with db.begin() as uow:
        for file in (mine, deleted, expired):
            uow.files.add(file)
        assert uow.files.delete(project, deleted.id)
        assert not uow.files.delete(project, deleted.id)
        assert not uow.files.delete("proj_default", mine.id)
        assert uow.files.get(project, mine.id) == mine
        assert [uow.files.get(*ids) for ids in ((project, deleted.id), (project, expired.id), ("proj_default", mine.id))] == [None] * 3


def test_file_pages_walk_both_ways_and_over_a_deleted_cursor(db: Database, project: str) -> None:
    files = [a_file(project, purpose=FilePurpose.BATCH_OUTPUT if number == 2 else FilePurpose.BATCH) for number in range(5)]
    with db.begin() as uow:
        for file in files:
            uow.files.add(file)

    def walk(*, ascending: bool, purpose: FilePurpose | None = None) -> list[str]:
        found: list[str] = []
        while True:
            with db.begin() as uow:
                page = uow.files.page(project, after=found[-1] if found else None, limit=2, ascending=ascending, purpose=purpose)
            found += [file.id for file in page.items]
            if not page.has_more:
                return found

    ids = [file.id for file in files]
    assert walk(ascending=True) == ids
    assert walk(ascending=False) == ids[::-1]
    assert walk(ascending=True, purpose=FilePurpose.BATCH) == [id for id in ids if id != ids[2]]
    with db.begin() as uow:
        uow.files.delete(project, ids[1])
        page = uow.files.page(project, after=ids[1], limit=10, ascending=True, purpose=None)
        assert [file.id for file in page.items] == ids[2:]
        with pytest.raises(InvalidRequest):
            uow.files.page("proj_default", after=ids[0], limit=10, ascending=True, purpose=None)


def test_objects_go_when_no_open_batch_reads_them(db: Database, project: str) -> None:
    batch = stored(db, project)
    assert batch.input_file_id is not None
    with db.begin() as uow:
        file = uow.files.get(project, batch.input_file_id)
        assert file is not None
        assert uow.files.in_use(file.id)
        uow.files.delete(project, file.id)
        assert file.storage_key not in uow.garbage.unreferenced_keys(1000)
        uow.batches.save(batch.to(BatchStatus.FAILED, uow.now))
        assert not uow.files.in_use(file.id)
        assert file.storage_key in uow.garbage.unreferenced_keys(1000)
        uow.garbage.forget_keys([file.storage_key])
        assert file.storage_key not in uow.garbage.unreferenced_keys(1000)
