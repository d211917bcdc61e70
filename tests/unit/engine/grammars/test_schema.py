"""Whatever a schema's grammar lets through is valid under the schema; what the compiler would ignore is refused by name."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine.grammars import backend
from engine.grammars.errors import GrammarError
from engine.grammars.schema import normalised
from engine.grammars.vocabulary import Vocabulary
from engine.types import Grammar, GrammarKind

END = 256
BYTES = Vocabulary((*(bytes([value]) for value in range(256)), b""), (END,))


@pytest.fixture(scope="module")
def info() -> Any:
    return backend.token_info(BYTES)


def compiled(info: Any, kind: GrammarKind, text: str) -> Any:
    return backend.load(info, backend.compile_grammar(info, Grammar(kind, text)))


def answers(form: Any, count: int, seed: int = 0) -> list[bytes]:
    """Random texts of the grammar: any allowed byte, with a liking for quotes, brackets and the end, so that texts end."""
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        matcher, text = backend.Matcher(form, END + 1), bytearray()
        while len(text) < 300:
            allowed = np.flatnonzero(np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")[: END + 1])
            assert len(allowed), f"nothing may follow {bytes(text)!r}"
            closing = [token for token in (END, *b'"}]') if token in allowed]
            plain = [int(token) for token in allowed if token < 128 or token == END]
            token = int(rng.choice(closing if closing and rng.random() < 0.4 else plain or allowed))
            assert matcher.take(token)
            if token == END:
                found.append(bytes(text))
                break
            text.append(token)
    return found


NODE = {"type": "object", "properties": {"v": {"type": "null"}, "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "length": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "class with a quote": {"type": "string", "pattern": '^[a"\\\\]{2}.[^x]$'},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "date-time": {"type": "string", "format": "date-time"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "uuid": {"type": "string", "format": "uuid"},
    "email": {"type": "string", "format": "email"},
    "integers": {"type": "integer", "minimum": -3, "exclusiveMaximum": 12},
    "multiples": {"type": "integer", "multipleOf": 5, "minimum": 1, "maximum": 30},
    "numbers": {"type": "number", "exclusiveMinimum": 0, "maximum": 1.5},
    "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    "list of anything": {"type": "array", "minItems": 1, "maxItems": 2},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}]},
    "object": {"type": "object", "properties": {"b": {"type": "boolean"}, "a": {"enum": ["x", "y"]}}, "required": ["a"]},
    "any object": {"type": "object"},
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    "names and more": {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "boolean"}},
    "patterned names": {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "null"}}, "additionalProperties": False},
    "named": {"type": "object", "propertyNames": {"pattern": "^[ab]$"}, "additionalProperties": {"type": "null"}},
    "types": {"type": ["string", "null", "integer"], "maxLength": 2, "minimum": 4},
    "enum and type": {"type": "string", "enum": ["a", 1, None]},
    "const": {"const": {"a": [1, 'x"\\\n']}},
    "either": {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 2}]},
    "discriminated": {
        "oneOf": [{"type": "object", "properties": {"k": {"const": name}}, "required": ["k"]} for name in ("cat", "dog")],
        "discriminator": {"propertyName": "k"},
    },
    "one of all": {"allOf": [{"type": "boolean"}]},
    "recursive": {"$defs": {"n": {**NODE, "required": ["v", "next"], "additionalProperties": False}}, "$ref": "#/$defs/n"},
    "keywords without a type": {"properties": {"a": {"maxLength": 1}}, "required": ["a"]},
    "escaped names": {"type": "object", "properties": {'a"b\\é\n': {"const": 'é"'}}, "required": ['a"b\\é\n']},
    "anything": {"type": "object", "properties": {"a": True}, "required": ["a"]},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_finished_text_is_valid(info: Any, name: str) -> None:
    schema = SCHEMAS[name]
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    found = answers(compiled(info, GrammarKind.JSON_SCHEMA, json.dumps(schema)), 80)
    for text in found:
        assert validator.is_valid(json.loads(text)), text
    assert len(set(found)) > 1 or name in ("const", "enum and type", "escaped names")


def test_declared_names_keep_their_schema_beside_others(info: Any) -> None:
    form = compiled(info, GrammarKind.JSON_SCHEMA, json.dumps(SCHEMAS["names and more"]))

    def fits(text: bytes) -> bool:
        matcher = backend.Matcher(form, END + 1)
        return all(matcher.take(byte) for byte in text)

    assert fits(b'{"a": null, "b": true}')
    assert fits(b'{"b": true}')
    assert not fits(b'{"a": true')


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "string", "not": {"const": "a"}}, "'not'"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "array", "contains": {"const": 1}}, "'contains'"),
        ({"if": {"const": 1}}, "'if'"),
        ({"type": "object", "properties": {"a": {"type": "string", "nullable": True}}}, "at '/properties/a': the keyword 'nullable'"),
        ({"allOf": [{"type": "string"}, {"maxLength": 1}]}, "'allOf' of several"),
        ({"anyOf": [{"type": "string"}], "minimum": 3}, "cannot be combined with minimum"),
        ({"$defs": {"a": {"type": "null"}}, "$ref": "#/$defs/a", "maxLength": 3}, "cannot be combined with maxLength"),
        ({"$ref": "#/$defs/a"}, "names nothing"),
        ({"$ref": "http://x/y"}, "names nothing"),
        ({"type": "string", "pattern": "^a$", "maxLength": 3}, "may have one"),
        ({"type": "string", "pattern": 'a"b'}, "in a pattern"),
        ({"type": "string", "pattern": "a\\nb"}, "in a pattern"),
        ({"type": "string", "pattern": "a\\u0022b"}, "in a pattern"),
        ({"type": "string", "format": "iban"}, "the format"),
        ({"type": "strin"}, "is not a type"),
        ({"type": "number", "multipleOf": 0.5}, "'multipleOf'"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "'required' names"),
        ({"type": "object", "properties": {"a": {}}, "patternProperties": {"^b": {}}}, "'patternProperties'"),
        ({"type": "object", "minProperties": 3}, "'minProperties'"),
        ({"type": "object", "properties": {"a": False}}, "allows nothing"),
        ({"type": "string", "maxLength": "5"}, "integer of 0 or more"),
        ({"maxLength": 3, "minimum": 2}, "says nothing of the type string"),
        ({"enum": []}, "at least one value"),
        ({"properties": {"a": {"$defs": {}}}}, "at the top"),
        ([], "a schema is an object"),
    ],
)
def test_what_could_not_be_promised_is_refused_by_name(schema: Any, words: str) -> None:
    with pytest.raises(GrammarError) as caught:
        normalised(schema)
    assert words in str(caught.value)


def test_depth_is_bounded() -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    with pytest.raises(GrammarError, match="levels deep"):
        normalised(schema)


def test_patterns_match_whole_answers(info: Any) -> None:
    assert set(answers(compiled(info, GrammarKind.REGEX, "(ab|c){2}"), 40)) == {b"abab", b"abc", b"cab", b"cc"}
    for pattern, words in (("(a", "parenthesis"), ("(?=a)b", "Lookahead"), (r"(a)\1", "Backreference")):
        with pytest.raises(GrammarError, match=words):
            compiled(info, GrammarKind.REGEX, pattern)


def test_calls_are_one_of_the_functions(info: Any) -> None:
    schema = {"type": "object", "properties": {"c": {"type": "boolean"}}, "required": ["c"]}
    calls = [{"before": f'<call>{{"name": "{name}", "arguments": ', "schema": schema, "after": "}</call>"} for name in ("f", "g")]
    found = set(answers(compiled(info, GrammarKind.CALLS, json.dumps(calls)), 40))
    assert found == {
        b'<call>{"name": "%b", "arguments": {"c": %b}}</call>' % (name, value) for name in (b"f", b"g") for value in (b"true", b"false")
    }


def random_pattern(rng: random.Random, depth: int = 0) -> str:
    kind = rng.random()
    if depth > 3 or kind < 0.25:
        return rng.choice(["a", "b", "c", "[ab]", "[^a]", r"\d", "ab", "[b-d]"])
    if kind < 0.5:
        return random_pattern(rng, depth + 1) + random_pattern(rng, depth + 1)
    if kind < 0.65:
        return f"({random_pattern(rng, depth + 1)}|{random_pattern(rng, depth + 1)})"
    atom = rng.choice(["a", "b", "[ab]", r"\d"]) if rng.random() < 0.4 else f"({random_pattern(rng, depth + 1)})"
    return atom + rng.choice(["?", "*", "+", "{2}", "{1,2}", "{0,2}", "{2,}"])


def test_random_patterns_let_through_what_re_matches(info: Any) -> None:
    """In a schema and alone: the library's two ways of reading a pattern differ."""
    rng = random.Random(1)
    fixed = [r"a(\.[0-9]{1,3})?b", "(ab{1,2})?c", "a(a{0,2}|a)", "([b-d]|(b|(([b-d]|b)){0,2}))", "(a[bc]*)?c"]
    for pattern in [*fixed, *(random_pattern(rng) for _ in range(60))]:
        whole = f"^{pattern}$"
        for text in answers(compiled(info, GrammarKind.JSON_SCHEMA, json.dumps({"type": "string", "pattern": whole})), 30):
            assert re.search(whole, json.loads(text)), (pattern, text)
        for text in answers(compiled(info, GrammarKind.REGEX, pattern), 30):
            assert re.fullmatch(pattern, text.decode()), (pattern, text)
