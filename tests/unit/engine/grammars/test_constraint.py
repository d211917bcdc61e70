"""Masks along a draft, drafts that cannot stand, and forced tokens, against the grammar followed anew from the start each time."""

from __future__ import annotations

import json

import numpy as np

from engine.grammars import GrammarConstraint, backend
from engine.grammars.vocabulary import Vocabulary
from engine.types import Grammar, GrammarKind

PIECES = (
    b"",
    b'{"',
    b"name",
    b'": ',
    b'"',
    b"a",
    b"b",
    b'", ',
    b"age",
    b"7",
    b"1",
    b"}",
    b'"}',
    b"n",
    b"x",
    b'{"na',
    b", ",
    b"-",
    b"0",
    b"m",
    b"e",
    b"g",
    b":",
    b" ",
    b",",
)
VOCABULARY = Vocabulary(PIECES, (0,))
END = 0
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[ab]*$"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def form() -> object:
    info = backend.token_info(VOCABULARY)
    return backend.load(info, backend.compile_grammar(info, Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))))


FORM = form()


def encode(text: str) -> list[int]:
    """Longest pieces first."""
    left, tokens = text.encode(), []
    while left:
        token = max((t for t, piece in enumerate(PIECES) if piece and left.startswith(piece)), key=lambda t: len(PIECES[t]), default=None)
        if token is None:
            return []
        tokens.append(token)
        left = left[len(PIECES[token]) :]
    return tokens


def constraint() -> GrammarConstraint:
    return GrammarConstraint(backend.Matcher(FORM, len(PIECES)), VOCABULARY, encode)


def allowed_after(tokens: list[int]) -> set[int]:
    matcher = backend.Matcher(FORM, len(PIECES))
    assert all(matcher.take(token) for token in tokens)
    return {token for token in range(len(PIECES)) if matcher.allowed()[0] >> token & 1}


def test_masks_follow_the_draft_and_leave_no_trace() -> None:
    held = constraint()
    rng = np.random.default_rng(0)
    output: list[int] = []
    for _ in range(60):
        good, text = [], list(output)
        for _ in range(int(rng.integers(0, 5))):
            if END in text:
                break
            good.append(int(rng.choice(sorted(allowed_after(text)))))
            text.append(good[-1])
        bad = [14] if rng.random() < 0.4 and END not in text else []
        drafts = np.array([*good, *bad], np.int64)
        masks = held.masks(np.array(output, np.int64), drafts)
        assert masks.shape == (len(drafts) + 1, 1)
        for row in range(len(good) + 1):
            if END not in [*output, *good[:row]]:
                assert {t for t in range(len(PIECES)) if masks[row, 0] >> t & 1} == allowed_after([*output, *good[:row]])
        assert held.legal(np.array(output, np.int64), drafts) == len(good)
        step = sorted(allowed_after(output))
        output.append(int(rng.choice(step)))
        if output[-1] == END:
            break


def test_forced_tokens_spell_out_what_is_certain() -> None:
    held = constraint()
    empty = np.empty(0, np.int64)
    tokens, kinds = held.forced(empty, 10)
    assert b"".join(PIECES[token] for token in tokens) == b'{"name": "'
    assert kinds == [1] * (len(tokens) - 1) + [2]
    assert held.forced(empty, 2)[0] == tokens[:2]
    output = np.array([*tokens, 5], np.int64)
    assert held.forced(output, 10) == ([], [])  # the string may go on or end
    output = np.array([*tokens, 5, 7], np.int64)
    assert b"".join(PIECES[token] for token in held.forced(output, 10)[0]) == b'"age": '
    output = np.array([*tokens, 5, 7, *held.forced(output, 10)[0], 9, 11], np.int64)
    assert held.forced(output, 10) == ([END], [0])  # nothing but the end may follow the last brace


def test_special_tokens_are_never_text() -> None:
    assert END not in allowed_after(encode('{"name": "a'))
