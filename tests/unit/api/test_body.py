"""JSON bodies: what is refused, and that refusing is all that happens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.body import parse_object
from service.errors import InvalidRequest


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b'{"a": NaN}', "invalid_json"),
        (b'{"a": "\xff"}', "invalid_json"),
        (rb'{"a": "\ud800"}', "invalid_json"),
        (rb'{"a": "x\u0000y"}', "invalid_value"),
        (rb'{"x\u0000": 1}', "invalid_value"),
        (rb'{"a": {"b": ["\u0000"]}}', "invalid_value"),
        (b'{"a":' + b"[" * 10 + b"]" * 10 + b"}", "too_deep"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
    ],
)
def test_a_body_that_cannot_be_stored_is_refused(raw: bytes, code: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_object(raw, max_depth=10)
    assert refusal.value.code == code


def test_the_deepest_allowed_body_passes() -> None:
    raw = b'{"a":' + b"[" * 9 + b"]" * 9 + b"}"
    assert parse_object(raw, max_depth=10) == {"a": [[[[[[[[[]]]]]]]]]}


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(raw: bytes) -> None:
    try:
        body = parse_object(raw, max_depth=5)
    except InvalidRequest:
        return
    assert isinstance(body, dict)
