"""Checks of single values. Each returns the value as the rest of the code wants it, or raises `LineRejected` naming the parameter.

Error codes are the ones OpenAI's API answers with, so clients that branch on them keep working.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from service.errors import InvalidRequest

Check = Callable[[str, Any], Any]
"""(parameter name, value that is not null) -> normalised value."""

INT32_MAX = 2**31 - 1
_SHOWN = 80


class LineRejected(InvalidRequest):
    """The body of one line asks for something this endpoint does not do: a 400 for this line, the others run."""

    @property
    def body(self) -> dict[str, Any]:
        """The response body OpenAI's API would answer with."""
        return error_body(self.message, param=self.param, code=self.code)


def error_body(message: str, *, param: str | None, code: str, type_: str = "invalid_request_error") -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def show(value: Any) -> str:
    """`value` as JSON, cut to a length that is safe to print."""
    if isinstance(value, str) and len(value) > _SHOWN:
        value = value[:_SHOWN]  # cut before encoding: the value may be megabytes
    elif isinstance(value, list | dict) and len(value) > _SHOWN:
        return f"{'an array' if isinstance(value, list) else 'an object'} of {len(value)} items"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def wrong_type(param: str, expected: str, value: Any) -> LineRejected:
    return LineRejected(f"Invalid type for '{param}': expected {expected}, got {show(value)}.", param=param, code="invalid_type")


def integer(low: int, high: int) -> Check:
    def check(param: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(param, f"an integer from {low} to {high}", value)
        if not low <= value <= high:
            side = "below_min" if value < low else "above_max"
            raise LineRejected(
                f"Invalid '{param}': got {show(value)}, allowed are integers from {low} to {high}.",
                param=param,
                code=f"integer_{side}_value",
            )
        return value

    return check


def number(low: float, high: float) -> Check:
    def check(param: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(param, f"a number from {low:g} to {high:g}", value)
        if not low <= value <= high:
            side = "below_min" if value < low else "above_max"
            raise LineRejected(
                f"Invalid '{param}': got {show(value)}, allowed are numbers from {low:g} to {high:g}.",
                param=param,
                code=f"decimal_{side}_value",
            )
        return float(value)

    return check


def string(max_length: int) -> Check:
    def check(param: str, value: Any) -> str:
        if not isinstance(value, str):
            raise wrong_type(param, "a string", value)
        if len(value) > max_length:
            raise LineRejected(
                f"Invalid '{param}': {len(value)} characters, at most {max_length} are allowed.",
                param=param,
                code="string_above_max_length",
            )
        return value

    return check


def only(*neutral: Any, why: str) -> Check:
    """Accepts the values that ask for nothing beyond the default (null always does)."""
    allowed = ", ".join([*(show(value) for value in neutral), "null"])

    def check(param: str, value: Any) -> None:
        # bool is an int in Python: `"n": true` must not pass for 1.
        if any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in neutral):
            return
        raise LineRejected(f"'{param}' {show(value)} is not supported: {why}. Allowed: {allowed}.", param=param, code="unsupported_value")

    return check


def stop_sequences(param: str, value: Any) -> tuple[str, ...]:
    """A string or up to four of them; an empty one would stop at once and is refused."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise wrong_type(param, "a string or an array of up to 4 strings", value)
    if len(items) > 4:
        raise LineRejected(f"Invalid '{param}': {len(items)} sequences, at most 4 are allowed.", param=param, code="array_above_max_length")
    if "" in items:
        raise LineRejected(f"Invalid '{param}': a stop sequence must have at least 1 character.", param=param, code="empty_string")
    return tuple(items)


def string_map(param: str, value: Any) -> None:
    """OpenAI's metadata: at most 16 pairs, keys to 64 and values to 512 characters."""
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise wrong_type(param, "an object with string values", value)
    if len(value) > 16 or any(len(key) > 64 or len(item) > 512 for key, item in value.items()):
        raise LineRejected(
            f"Invalid '{param}': at most 16 pairs, keys of at most 64 and values of at most 512 characters.",
            param=param,
            code="invalid_value",
        )


MAX_BIASES, MAX_STOP_TOKENS = 1024, 64
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def token_biases(param: str, value: Any) -> tuple[tuple[int, float], ...]:
    """`{"token id": bias}`, as OpenAI has it: what is added to the token's logit, -100 to 100."""
    if not isinstance(value, dict):
        raise wrong_type(param, 'an object such as {"1234": -100}', value)
    if len(value) > MAX_BIASES:
        raise LineRejected(
            f"Invalid '{param}': {len(value)} tokens, at most {MAX_BIASES} are allowed.", param=param, code="object_above_max_properties"
        )
    biases: dict[int, float] = {}
    for name, bias in value.items():
        # Only the usual spelling, so that two keys never mean one token.
        if not _TOKEN_ID.fullmatch(name) or int(name) > INT32_MAX:
            raise LineRejected(
                f"Invalid '{param}': {show(name)} is not a token id, which is an integer of 0 or more.", param=param, code="invalid_value"
            )
        biases[int(name)] = number(-100, 100)(f"{param}.{name}", bias)
    return tuple(biases.items())


def token_ids(param: str, value: Any) -> tuple[int, ...]:
    """An array of token ids."""
    if not isinstance(value, list):
        raise wrong_type(param, "an array of token ids", value)
    if len(value) > MAX_STOP_TOKENS:
        raise LineRejected(
            f"Invalid '{param}': {len(value)} tokens, at most {MAX_STOP_TOKENS} are allowed.", param=param, code="array_above_max_length"
        )
    return tuple(_token(f"{param}[{position}]", token) for position, token in enumerate(value))


def prompts(param: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
    """The `prompt` of /v1/completions: text, token ids, or an array of either."""
    several = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    if not several:
        return (_prompt(param, value),)
    return tuple(_prompt(f"{param}[{index}]", item) for index, item in enumerate(value))


def _prompt(param: str, value: Any) -> str | tuple[int, ...]:
    prompt: str | tuple[int, ...]
    if isinstance(value, list):
        prompt = tuple(_token(f"{param}[{position}]", token) for position, token in enumerate(value))
    elif isinstance(value, str):
        prompt = value
    else:
        raise wrong_type(param, "a string or an array of token ids", value)
    if not prompt:
        raise LineRejected(f"Invalid '{param}': it is empty; at least 1 character or token is needed.", param=param, code="invalid_value")
    return prompt


def _token(param: str, token: Any) -> int:
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= INT32_MAX:
        raise wrong_type(param, "a token id (an integer of 0 or more)", token)
    return token
