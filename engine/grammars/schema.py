"""JSON schemas in the form that the grammar compiler takes literally: what it would ignore or get wrong is rewritten or refused by name.

A schema's grammar may allow less than the schema (objects with `properties` get no others unless a schema for them is given, strings
under a length have no escapes), never more: whatever a finished answer says is valid. Keys come in the order of `properties`. No I/O.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from engine.grammars.errors import GrammarError

MAX_DEPTH = 64

_ANNOTATIONS = frozenset(
    {"$schema", "$id", "$comment", "title", "description", "default", "examples", "example", "deprecated", "discriminator"}
)
_DEFINITIONS = ("$defs", "definitions")
_OF_TYPE: Mapping[str, frozenset[str]] = {
    "string": frozenset({"pattern", "format", "minLength", "maxLength"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "boolean": frozenset(),
    "null": frozenset(),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "object": frozenset(
        {"properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties", "maxProperties"}
    ),
}
_BRANCHES = ("anyOf", "oneOf", "allOf")
_KNOWN = frozenset({"type", "enum", "const", "$ref", *_BRANCHES, *_DEFINITIONS, *_ANNOTATIONS}).union(*_OF_TYPE.values())

_DATE = r"[1-9][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+\-]([01][0-9]|2[0-3]):[0-5][0-9])"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_FORMATS: Mapping[str, str | None] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "ipv4": rf"({_OCTET}\.){{3}}{_OCTET}",
    **dict.fromkeys(("email", "uuid", "ipv6", "hostname", "uri", "duration")),
}
"""Format -> our pattern, or None where the compiler's own is right. Days that some years lack (29 February) are left out."""
_PLAIN = r"[^\"\\\x00-\x1f]"
"""A character that stands for itself in a JSON string."""
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
_ESCAPE = re.compile(r"\\.", re.DOTALL)
_OPTIONAL = re.compile(r"(\?|\{0,1\})\??")
_REPETITION = re.compile(r"([*+]|\{[0-9,]+\})\??|\?")
_UNSAFE = re.compile(r'"|\\["\\nrtfvx0uc]|[\x00-\x1f]')


def normalised(schema: Any) -> dict[str, Any]:
    """`schema` (a JSON value) rewritten. Raises GrammarError with the place, as a JSON pointer, and what is wrong there."""
    return _Reader(schema).read(schema, "", 0)


class _Reader:
    def __init__(self, root: Any) -> None:
        self._root = root

    def read(self, schema: Any, at: str, depth: int) -> dict[str, Any]:
        if depth > MAX_DEPTH:
            raise GrammarError(f"at {_place(at)}: schemas may be {MAX_DEPTH} levels deep")
        if schema is True:
            return {}
        if schema is False:
            raise GrammarError(f"at {_place(at)}: the schema false allows nothing")
        if not isinstance(schema, dict):
            raise GrammarError(f"at {_place(at)}: a schema is an object, true or false")
        for name in schema:
            if name not in _KNOWN:
                raise GrammarError(f"at {_place(at)}: the keyword {name[:40]!r} is not supported")
        made = self._one(schema, at, depth)
        for name in _DEFINITIONS:
            if name in schema:
                if depth:
                    raise GrammarError(f"at {_place(at)}: {name!r} belongs at the top of the schema")
                made[name] = {key: self.read(item, f"{at}/{name}/{key}", depth + 1) for key, item in _object(schema, name, at).items()}
        return made

    def _one(self, schema: dict[str, Any], at: str, depth: int) -> dict[str, Any]:
        said = [name for name in schema if name not in _ANNOTATIONS and name not in _DEFINITIONS]
        for name in ("$ref", *_BRANCHES):
            if name in said:
                if len(said) > 1:
                    raise GrammarError(f"at {_place(at)}: {name!r} cannot be combined with {', '.join(n for n in said if n != name)}")
                return self._reference(schema[name], at) if name == "$ref" else self._branches(name, schema[name], at, depth)
        if "enum" in said or "const" in said:
            return self._values(schema, said, at)
        types = self._types(schema, said, at)
        if not types:
            return {}
        if len(types) == 1:
            return self._typed(types[0], schema, at, depth)
        return {"anyOf": [self._typed(name, schema, at, depth) for name in types]}

    def _reference(self, target: Any, at: str) -> dict[str, Any]:
        if target != "#":
            parts = target.split("/") if isinstance(target, str) else []
            known = len(parts) == 3 and parts[0] == "#" and parts[1] in _DEFINITIONS and isinstance(self._root.get(parts[1]), dict)
            if not known or parts[2].replace("~1", "/").replace("~0", "~") not in self._root[parts[1]]:
                raise GrammarError(f'at {_place(at)}: $ref {_shown(target)} names nothing; allowed are "#" and "#/$defs/NAME"')
        return {"$ref": target}

    def _branches(self, name: str, branches: Any, at: str, depth: int) -> dict[str, Any]:
        if not isinstance(branches, list) or not branches:
            raise GrammarError(f"at {_place(at)}: {name!r} is an array with at least one schema")
        made = [self.read(branch, f"{at}/{name}/{place}", depth + 1) for place, branch in enumerate(branches)]
        if len(made) == 1:
            return made[0]
        if name == "allOf":
            raise GrammarError(f"at {_place(at)}: 'allOf' of several schemas is not supported")
        return {name: made}  # branches of oneOf that are not plainly disjoint make the compiler complain

    def _values(self, schema: dict[str, Any], said: list[str], at: str) -> dict[str, Any]:
        values = [schema["const"]] if "const" in said else schema["enum"]
        if not isinstance(values, list) or not values:
            raise GrammarError(f"at {_place(at)}: 'enum' is an array with at least one value")
        others = [name for name in said if name not in ("type", "const", "enum")]
        if others or {"const", "enum"} <= set(said):
            raise GrammarError(
                f"at {_place(at)}: 'enum' and 'const' can be combined with 'type' alone, not with {', '.join(others) or 'both'}"
            )
        types = self._types(schema, ["type"], at) if "type" in said else list(_OF_TYPE)
        fitting = [value for value in values if any(_is(value, name) for name in types)]
        if not fitting:
            raise GrammarError(f"at {_place(at)}: no value is of the type asked for")
        return {"enum": fitting}

    def _types(self, schema: dict[str, Any], said: list[str], at: str) -> list[str]:
        """The types asked for; without any, the one type that the keywords are about."""
        if "type" in said:
            types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            for name in types:
                if name not in _OF_TYPE:
                    raise GrammarError(f"at {_place(at)}: {_shown(name)} is not a type; allowed are {', '.join(_OF_TYPE)}")
            if not types:
                raise GrammarError(f"at {_place(at)}: 'type' is an empty array")
        elif said:
            types = [next((name for name, keywords in _OF_TYPE.items() if said[0] in keywords), "")]
        else:
            return []
        for name in said:
            if name != "type" and not any(name in _OF_TYPE[one] for one in types):
                why = f"says nothing of the type {', '.join(types)}"
                raise GrammarError(f"at {_place(at)}: the keyword {name!r} is not supported here: it {why}")
        return types

    def _typed(self, name: str, schema: dict[str, Any], at: str, depth: int) -> dict[str, Any]:
        own = {key: value for key, value in schema.items() if key in _OF_TYPE[name]}
        for key in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"):
            if key in own and (isinstance(own[key], bool) or not isinstance(own[key], int) or own[key] < 0):
                raise GrammarError(f"at {_place(at)}: {key!r} is an integer of 0 or more, not {_shown(own[key])}")
        if name == "string":
            return self._string(own, at)
        if name == "array":
            return self._array(own, at, depth)
        if name == "object":
            return self._of_properties(own, at, depth)
        for key, value in own.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise GrammarError(f"at {_place(at)}: {key!r} is a number, not {_shown(value)}")
        return {"type": name, **own}

    def _string(self, own: dict[str, Any], at: str) -> dict[str, Any]:
        asked = [key for key in ("pattern", "format") if key in own] + (["length"] if {"minLength", "maxLength"} & own.keys() else [])
        if len(asked) > 1:
            raise GrammarError(f"at {_place(at)}: of 'pattern', 'format' and a length a string may have one, not {' and '.join(asked)}")
        if "format" in own:
            if own["format"] not in _FORMATS:
                raise GrammarError(
                    f"at {_place(at)}: the format {_shown(own['format'])} is not supported; allowed are {', '.join(_FORMATS)}"
                )
            pattern = _FORMATS[own["format"]]
            return {"type": "string", **({"format": own["format"]} if pattern is None else {"pattern": _spelled_out(f"^{pattern}$")})}
        if "pattern" in own:
            return {"type": "string", "pattern": _checked_pattern(own["pattern"], at)}
        if asked:
            low, high = own.get("minLength", 0), own.get("maxLength", "")
            if high != "" and low > high:
                raise GrammarError(f"at {_place(at)}: minLength is more than maxLength")
            return {"type": "string", "pattern": f"^{_PLAIN}{{{low},{high}}}$"}
        return {"type": "string"}

    def _array(self, own: dict[str, Any], at: str, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {"type": "array", **{key: own[key] for key in ("minItems", "maxItems") if key in own}}
        if "prefixItems" in own:
            if not isinstance(own["prefixItems"], list):
                raise GrammarError(f"at {_place(at)}: 'prefixItems' is an array of schemas")
            made["prefixItems"] = [self.read(item, f"{at}/prefixItems/{place}", depth + 1) for place, item in enumerate(own["prefixItems"])]
        items = own.get("items", "prefixItems" not in own)
        made["items"] = items if items is False else self.read(items, f"{at}/items", depth + 1) or True
        return made

    def _of_properties(self, own: dict[str, Any], at: str, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {"type": "object", **{key: own[key] for key in ("minProperties", "maxProperties") if key in own}}
        properties = _object(own, "properties", at)
        made["properties"] = {key: self.read(item, f"{at}/properties/{key}", depth + 1) or True for key, item in properties.items()}
        required = own.get("required", [])
        if not isinstance(required, list):
            raise GrammarError(f"at {_place(at)}: 'required' is an array of names")
        for name in required:
            if name not in properties:
                raise GrammarError(f"at {_place(at)}: 'required' names {_shown(name)}, which is not in 'properties'")
        made["required"] = required
        if "patternProperties" in own:
            patterns = _object(own, "patternProperties", at)
            if properties or len(patterns) > 1 or own.get("additionalProperties", False) is not False:
                raise GrammarError(f"at {_place(at)}: 'patternProperties' may hold one pattern, without other properties beside it")
            made["patternProperties"] = {
                _checked_pattern(key, at): self.read(item, f"{at}/patternProperties/{key}", depth + 1) or True
                for key, item in patterns.items()
            }
        if "propertyNames" in own:
            if properties or "patternProperties" in own:
                raise GrammarError(f"at {_place(at)}: 'propertyNames' is supported for objects without other keywords on names")
            made["propertyNames"] = self.read({"type": "string", **_object(own, "propertyNames", at)}, f"{at}/propertyNames", depth + 1)
        closed = bool(properties) or "patternProperties" in own
        # `true` beside properties is left out: a model that may add whatever it likes seldom stops.
        more = False if closed and own.get("additionalProperties", True) is True else own.get("additionalProperties", True)
        made["additionalProperties"] = more if more is False else self.read(more, f"{at}/additionalProperties", depth + 1) or True
        if made["additionalProperties"] is not False and made.get("minProperties", 0) > max(1, len(required)):
            # A grammar cannot tell that a key was there before, so it would count one twice.
            raise GrammarError(f"at {_place(at)}: 'minProperties' needs names that are all known")
        return made


def _checked_pattern(pattern: Any, at: str) -> str:
    """A pattern whose matches stand for themselves between quotes. (Classes leave out what would need an escape by themselves.)"""
    if not isinstance(pattern, str):
        raise GrammarError(f"at {_place(at)}: a pattern is a string")
    if found := _UNSAFE.search(_CLASS.sub("", pattern)):
        raise GrammarError(f"at {_place(at)}: {found[0]!r} in a pattern is not supported: JSON writes such characters with a backslash")
    return _spelled_out(pattern)


def _spelled_out(pattern: str) -> str:
    """The same pattern in forms that the compiler gets right (found by comparing random patterns with `re`): `(...)?` as `((...)|)`, and
    nothing, spelled `()`, between a repetition and the end of its branch, so that its loop is not shared with other branches.
    """
    made: list[str] = []
    opened: list[int] = []
    left = pattern
    while left:
        found = _CLASS.match(left) or _ESCAPE.match(left) or _REPETITION.match(left)
        piece = found[0] if found else left[0]
        left = left[len(piece) :]
        if piece == "(":
            opened.append(len(made))
        made.append(piece)
        if piece == ")" and opened:
            start = opened.pop()
            if optional := _OPTIONAL.match(left):
                left = left[len(optional[0]) :]
                made[start:] = ["((", "".join(made[start:])[1:], "|)"]
        elif _REPETITION.fullmatch(piece) and left[:1] in ("|", ")"):
            made.append("()")
    return "".join(made)


def _object(schema: dict[str, Any], name: str, at: str) -> dict[str, Any]:
    value = schema.get(name, {})
    if not isinstance(value, dict):
        raise GrammarError(f"at {_place(at)}: {name!r} is an object")
    return value


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if isinstance(value, float):
        return name == "number" or (name == "integer" and value.is_integer())
    kinds = {"string": str, "integer": int, "number": int, "array": list, "object": dict, "null": type(None)}
    return name in kinds and isinstance(value, kinds[name])


def _place(at: str) -> str:
    return repr(at[:80]) if at else "the top"


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]
