"""Projects and their keys on PostgreSQL."""

from __future__ import annotations

from uuid import uuid4

import pytest

from service.domain.account import ApiKey
from service.errors import Conflict, InvalidRequest
from service.ports import Database
from service.usecases.keys import create_project, find_project
from tests.integration.stored import AT


def test_a_project_name_is_taken_once(db: Database) -> None:
    name = uuid4().hex
    with db.begin() as uow:
        uow.accounts.add_project(name)
    with db.begin() as uow, pytest.raises(Conflict, match=name):
        uow.accounts.add_project(name)


@pytest.mark.parametrize("name", ["", "  ", "n" * 101, "two\nlines", "proj_0123"])
def test_a_project_name_can_be_read_and_is_no_id(db: Database, name: str) -> None:
    with pytest.raises(InvalidRequest, match="project's name"):
        create_project(db, name)
    made = create_project(db, f"{uuid4().hex} of Zoë")
    with db.begin() as uow:
        assert find_project(uow, made.name) == find_project(uow, made.id) == made


def test_keys_by_prefix_are_the_live_ones_and_a_use_is_noted_once_a_minute(db: Database, project: str) -> None:
    first, second = (ApiKey(uuid4().hex, project, "n", "ld-abc", uuid4().bytes, AT, ("read",)) for _ in range(2))
    with db.begin() as uow:
        uow.accounts.add_key(first)
        uow.accounts.add_key(second)
    with db.begin() as uow:
        assert uow.accounts.revoke_key(first.id)
        assert not uow.accounts.revoke_key(first.id)
        (live,) = uow.accounts.keys_with_prefix("ld-abc")
        assert (live.id, live.digest, live.scopes) == (second.id, second.digest, ("read",))
        uow.accounts.touch_key(second.id)
    with db.begin() as uow:
        used = {key.id: key.last_used_at for key in uow.accounts.keys(project)}
        uow.accounts.touch_key(second.id)
        assert {key.id: key.last_used_at for key in uow.accounts.keys(project)} == used
    assert used[first.id] is None
    assert used[second.id] is not None
