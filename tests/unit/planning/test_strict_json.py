"""Strict JSON against the standard library's parser, told to refuse the same things."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.planning.strict_json import InvalidJson, strict_loads


class Pairs(list):
    """An object as written: repeated keys and all."""


KEYS = st.sampled_from(["a", "b", 'q"', "\\", ":", '\\":', "é"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(KEYS, inner), max_size=3).map(Pairs),
)


def write(value):
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)} : {write(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(write, value)) + "]"
    return json.dumps(value)


def repeats(value):
    if isinstance(value, Pairs):
        return len({key for key, _ in value}) < len(value) or any(repeats(item) for _, item in value)
    return isinstance(value, list) and any(map(repeats, value))


@given(VALUES)
def test_repeated_keys_are_found_wherever_they_are(value):
    text = write(value)
    if repeats(value):
        with pytest.raises(InvalidJson, match="occurs more than once"):
            strict_loads(text.encode(), max_depth=50)
    else:
        assert strict_loads(text.encode(), max_depth=50) == json.loads(text)


@pytest.mark.parametrize("depth", [1, 5])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_depth_counts_containers(depth, opening):
    closing = {"[": "]"}.get(opening, "}")
    text = (opening * depth + "1" + closing * depth).encode()
    assert strict_loads(text, max_depth=depth) is not None
    with pytest.raises(InvalidJson, match=f"deeper than {depth - 1} levels"):
        strict_loads(text, max_depth=depth - 1)


def test_the_message_says_where():
    with pytest.raises(InvalidJson, match=r"at character 8, near"):
        strict_loads(b'{"ab": tru}', max_depth=5)


def test_many_escapes_are_linear():
    data = b'"' + b'\\"' * 2_000_000 + b'"'
    assert len(strict_loads(data, max_depth=5)) == 2_000_000
    with pytest.raises(InvalidJson):
        strict_loads(b'"' + b"\\\\" * 2_000_000, max_depth=5)
