"""service/REQUESTS.md says of every field what the code does, and the SDK has no field that it leaves out."""

from __future__ import annotations

import pytest

from service.domain.request_body import ENDPOINTS
from tests.unit.domain.request_fields import PAGE, PARTS, TESTS, exists, page, part_rows, rows, sdk_fields, sdk_parts


def test_the_page_is_what_the_code_does() -> None:
    assert PAGE.read_text() == page(), "write it anew: python -m tests.unit.domain.request_fields"


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_field_of_the_sdk_is_supported_or_refused(endpoint: str) -> None:
    found = {row.field: row for row in rows(endpoint)}
    assert found.keys() == sdk_fields(endpoint) | ENDPOINTS[endpoint].keys()
    assert len(sdk_fields(endpoint)) > 15
    for row in found.values():
        assert row.supported or ("Allowed:" in row.evidence and row.field in row.evidence)


def test_every_type_inside_a_chat_request_is_supported_or_refused() -> None:
    assert {part.type for part in PARTS} == set(sdk_parts())
    assert len(list(part_rows())) > len(PARTS)
    for part in PARTS:
        assert set(part.value) <= set(sdk_parts()[part.type])


def test_a_field_that_the_table_does_not_know_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the SDK grows one, the page shows it as refused, and so is no longer what is committed."""
    monkeypatch.setattr("tests.unit.domain.request_fields.sdk_fields", lambda endpoint: {"model", "telepathy"})
    added = {row.field: row for row in rows("/v1/completions")}["telepathy"]
    assert (added.supported, added.evidence) == (False, "Unknown parameter: 'telepathy'.")
    assert page() != PAGE.read_text()


@pytest.mark.parametrize("test", sorted({*TESTS.values(), *(part.test for part in PARTS if part.test)}))
def test_the_tests_that_are_named_exist(test: str) -> None:
    assert exists(test)


def test_a_test_that_does_not_exist_is_noticed() -> None:
    assert not exists("tests/unit/domain/test_request_fields.py::test_nothing")
    assert not exists("tests/nowhere.py::test_nothing")
