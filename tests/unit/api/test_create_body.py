"""The types and sizes of a create."""

from __future__ import annotations

from typing import Any

import pytest

from service.api.create_body import NOT_YET, parse_create
from service.domain.job import OnInvalidLine
from service.errors import InvalidRequest

GOOD: dict[str, Any] = {"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"}


def test_a_full_body_becomes_a_request() -> None:
    request = parse_create(
        GOOD
        | {
            "metadata": {"team": "search"},
            "output_expires_after": {"anchor": "created_at", "seconds": 3600},
            "priority": 9,
            "on_invalid_line": "skip",
            "drafter": "off",
        }
    )
    assert (request.metadata, request.output_expires_after, request.priority) == ({"team": "search"}, 3600, 9)
    assert (request.on_invalid_line, request.drafter) == (OnInvalidLine.SKIP, "off")


def test_what_is_left_out_or_null_takes_its_default() -> None:
    request = parse_create(GOOD | {"metadata": None, "output_expires_after": None, "webhook": None, "dry_run": False})
    assert (request.metadata, request.output_expires_after, request.priority, request.drafter) == ({}, None, 0, "auto")


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"input_file_id": ...}, "input_file_id", "missing_required_parameter"),
        ({"endpoint": ...}, "endpoint", "missing_required_parameter"),
        ({"completion_window": ...}, "completion_window", "missing_required_parameter"),
        ({"input_file_id": 7}, "input_file_id", "invalid_type"),
        ({"input_file_id": None}, "input_file_id", "missing_required_parameter"),
        ({"input_uri": "s3://bucket/key"}, "input_uri", "invalid_value"),
        ({"input_uri": 1}, "input_uri", "invalid_type"),
        ({"output_uri": 1}, "output_uri", "invalid_type"),
        ({"color": "red"}, "color", "unknown_parameter"),
        ({"metadata": []}, "metadata", "invalid_type"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "invalid_value"),
        ({"metadata": {"k" * 65: ""}}, f"metadata.{'k' * 65}", "invalid_value"),
        ({"metadata": {"": ""}}, "metadata.", "invalid_value"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "invalid_value"),
        ({"output_expires_after": {"anchor": "created_at"}}, "output_expires_after.seconds", "missing_required_parameter"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor", "invalid_value"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}}, "output_expires_after.seconds", "invalid_value"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 2592001}}, "output_expires_after.seconds", "invalid_value"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": "3600"}}, "output_expires_after.seconds", "invalid_type"),
        ({"priority": 10}, "priority", "invalid_value"),
        ({"priority": -1}, "priority", "invalid_value"),
        ({"priority": True}, "priority", "invalid_type"),
        ({"priority": 1.0}, "priority", "invalid_type"),
        ({"on_invalid_line": "ignore"}, "on_invalid_line", "invalid_value"),
        ({"drafter": 3}, "drafter", "invalid_type"),
        ({"max_cost": True}, "max_cost", "invalid_type"),
        ({"max_cost": [1]}, "max_cost", "invalid_type"),
        ({"max_cost": -1}, "max_cost", "invalid_value"),
        ({"max_cost": 0}, "max_cost", "invalid_value"),
        ({"max_cost": "0.00"}, "max_cost", "invalid_value"),
        ({"max_cost": "1e3"}, "max_cost", "invalid_value"),
        ({"max_cost": "0.0000000000000001"}, "max_cost", "invalid_value"),
        ({"dry_run": 1}, "dry_run", "invalid_type"),
    ],
)
def test_the_first_bad_parameter_is_named(change: dict[str, Any], param: str, code: str) -> None:
    body = {name: value for name, value in (GOOD | change).items() if value is not ...}
    with pytest.raises(InvalidRequest) as refusal:
        parse_create(body)
    assert (refusal.value.param, refusal.value.code) == (param, code)
    assert "'" in refusal.value.message


@pytest.mark.parametrize("name", NOT_YET)
@pytest.mark.parametrize("value", [True, 0, "", {"url": "https://example.com"}])
def test_what_is_not_available_yet_is_never_ignored(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_create(GOOD | {name: value})
    assert (refusal.value.param, refusal.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("value", "femto"),
    [("2.50", 25 * 10**14), (2.5, 25 * 10**14), (3, 3 * 10**15), (1e-15, 1), ("0.000000000000001", 1), (0.1, 10**14), (None, None)],
)
def test_a_cap_is_exact(value: Any, femto: int | None) -> None:
    assert parse_create(GOOD | {"max_cost": value}).max_cost == femto
