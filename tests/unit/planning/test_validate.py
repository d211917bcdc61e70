"""The verdict on every kind of bad line, and on files as a whole."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.job import InputError
from service.planning.validate import ErrorList, InputRefused, LineRules, check_lines
from tests.bad_input import ACCEPTED, BAD_LINES, ENDPOINT, MODEL, body, good

RULES = LineRules(ENDPOINT, {MODEL: MODEL, "gpt-4o-mini": MODEL}.get, max_lines=5, max_line_bytes=300_000, max_json_depth=100)


def check(*chunks, rules=RULES):
    return list(check_lines(chunks, rules))


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda bad: bad.name)
def test_a_bad_line_is_refused_and_its_neighbours_are_not(bad):
    before, verdict, after = check(good("first") + b"\n" + bad.line + b"\n" + good("last"))
    assert (before.error, after.error) == (None, None)
    assert verdict.error is not None
    assert (verdict.error.code, verdict.error.line) == (bad.code, 2)
    assert bad.says in verdict.error.message
    assert len(verdict.error.message) < 400
    assert verdict.staged.custom_id == bad.custom_id
    assert verdict.staged.model is None
    assert verdict.body is None


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    checked = check(ACCEPTED[name])
    assert [line.error for line in checked] == [None, None]
    assert [line.staged.line_no for line in checked] == [1, 2]
    assert all(line.staged.model == MODEL and line.body and line.body["model"] == MODEL for line in checked)


def test_ranges_give_the_bytes_back():
    data = b"\xef\xbb\xbf" + good("a") + b"\r\n" + good("b")
    a, b = (line.staged for line in check(data))
    assert data[a.offset : a.offset + a.length] == good("a")
    assert data[b.offset : b.offset + b.length] == good("b")


def test_an_alias_is_resolved_and_the_body_keeps_what_the_user_wrote():
    [line] = check(good(body=body(model="gpt-4o-mini")))
    assert line.staged.model == MODEL
    assert line.body["model"] == "gpt-4o-mini"


def test_a_line_over_the_limit_is_refused_by_its_length():
    long = good("long", body=body(user="x" * 300_000))
    first, second = check(long + b"\n" + good())
    assert first.error == InputError("line_too_long", f"The line is {len(long)} bytes long; at most 300000 are allowed.", 1)
    assert first.staged.length == len(long)
    assert second.error is None


@pytest.mark.parametrize("data", [b"", b"\n", b"\n\n\r\n  \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n", b"\n" * 5000])
def test_a_file_without_requests_is_empty(data):
    with pytest.raises(InputRefused) as refused:
        check(data)
    assert refused.value.error.code == "empty_file"


def test_too_many_lines():
    lines = [good(f"c{n}") for n in range(5)]
    assert len(check(b"\n".join(lines))) == 5
    assert len(check(b"\n".join(lines) + b"\n" * 50)) == 5
    for extra in (good("one more"), b"\n" * 50 + good("one more"), b"not json"):
        with pytest.raises(InputRefused, match="more than the 5 lines") as refused:
            check(b"\n".join(lines) + b"\n" + extra)
        assert refused.value.error.code == "too_many_tasks"


def test_the_error_list_is_bounded_and_counts_the_rest():
    errors = ErrorList(limit=2)
    assert not errors
    for line in (3, 1, 2, 9):
        errors.add(InputError("invalid_json_line", "m", line))
    assert errors
    listed = errors.as_tuple()
    assert [(error.code, error.line) for error in listed] == [("invalid_json_line", 1), ("invalid_json_line", 3), ("more_errors", None)]
    assert listed[-1].message == "2 more errors are not listed; the first 2 are."


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["model", "messages", "content", "text", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.lists(st.binary(max_size=30) | JSON.map(orjson.dumps), max_size=5), st.integers(1, 40))
def test_any_bytes_get_a_verdict(lines, max_line_bytes):
    rules = LineRules(ENDPOINT, {MODEL: MODEL}.get, max_line_bytes=max_line_bytes)
    data = b"\n".join(lines)
    if not data.removeprefix(b"\xef\xbb\xbf").strip():
        with pytest.raises(InputRefused, match="no requests"):
            check(data, rules=rules)
        return
    checked = check(data, rules=rules)
    assert [line.staged.line_no for line in checked] == list(range(1, len(checked) + 1))
    assert all(line.error is not None for line in checked)


@given(JSON, JSON, JSON, JSON)
def test_any_envelope_gets_a_verdict(custom_id, method, url, content):
    line = orjson.dumps({"custom_id": custom_id, "method": method, "url": url, "body": content})
    [checked] = check(line)
    assert checked.error is not None


@given(JSON, JSON)
def test_any_prompt_can_be_grouped(messages, prompt):
    [checked] = check(good(body={"model": MODEL, "messages": messages, "prompt": prompt, "max_tokens": messages}))
    assert checked.error is None
    assert checked.staged.prefix_key
    assert 0 < checked.staged.expected_tokens < 2**31
