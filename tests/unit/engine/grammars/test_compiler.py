"""Compiling in a process of its own: once each, within limits, and what is wrong is said."""

from __future__ import annotations

import gc
import json

import pytest

from engine.grammars import Compiler, GrammarError
from engine.grammars.backend import Matcher
from engine.grammars.frames import Limits
from engine.grammars.vocabulary import Vocabulary
from engine.types import Grammar, GrammarKind

VOCABULARY = Vocabulary((*(bytes([value]) for value in range(256)), b"true", b"{}", b""), (258,))
BOOLEAN = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "boolean"}')
SLOW = Grammar(GrammarKind.REGEX, "([ab]|a[bc]){0,4000}(x|y.){0,4000}.{0,9000}z")


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler(lambda: VOCABULARY, Limits(cpu_seconds=0.5))


def test_equal_grammars_are_compiled_once(compiler: Compiler) -> None:
    first = compiler.submit(BOOLEAN)
    assert compiler.submit(Grammar(GrammarKind.JSON_SCHEMA, '{"type": "boolean"}')) is first
    matcher = Matcher(first.result(), 259)
    assert not matcher.take(ord("a"))
    assert matcher.take(256)  # "true"
    assert matcher.take(258)
    assert matcher.ended


def test_time_is_bounded_and_the_next_one_compiles(compiler: Compiler) -> None:
    with pytest.raises(GrammarError, match=r"more than 0\.5 s"):
        compiler.compile(SLOW)
    assert compiler.compile(Grammar(GrammarKind.REGEX, "ab+"))


def test_memory_is_bounded() -> None:
    small = Compiler(lambda: VOCABULARY, Limits(cpu_seconds=60.0, memory_bytes=24 << 20))
    with pytest.raises(GrammarError, match="too much memory"):
        small.compile(Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"enum": [f"value {n} " * 9 for n in range(60_000)]})))
    assert small.compile(BOOLEAN)


def test_the_size_of_what_is_compiled_is_bounded() -> None:
    small = Compiler(lambda: VOCABULARY, Limits(compiled_bytes=1000))
    with pytest.raises(GrammarError, match="too large"):
        small.compile(Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"enum": [f"value {n}" for n in range(100)]})))


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar(GrammarKind.REGEX, "a^b"), "'\\^' should be at the start"),
        (Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"oneOf": [{"type": "integer"}, {"type": "number"}]})), "oneOf"),
        (Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"type": "string", "pattern": "^(?=a)b$"})), "Lookahead"),
        (Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"type": "string", "not": {}})), "'not'"),
    ],
)
def test_what_the_library_would_leave_out_is_an_error(compiler: Compiler, grammar: Grammar, words: str) -> None:
    with pytest.raises(GrammarError, match=words):
        compiler.compile(grammar)


def test_the_process_ends_with_the_compiler() -> None:
    compiler = Compiler(lambda: VOCABULARY)
    compiler.compile(BOOLEAN)
    process = compiler._process
    assert process is not None
    assert process.poll() is None
    del compiler
    gc.collect()
    assert process.poll() is not None
