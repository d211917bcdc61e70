"""The checks of the streaming pass over an input file. Pure: bytes in, checked lines out, memory flat at any size.

What is refused here keeps a line from being run at all (OpenAI fails the whole batch for it). What only the endpoint would refuse, such as
a temperature of 9, is left to the run and becomes that line's 400.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from service.domain.job import InputError
from service.domain.line import StagedLine
from service.domain.requests.checks import show
from service.planning.estimate import expected_tokens
from service.planning.prefix import prefix_key
from service.planning.splitter import LineSplitter, RawLine
from service.planning.strict_json import InvalidJson, strict_loads

MAX_CUSTOM_ID = 512
MAX_MODEL_NAME = 256
_LONGEST_RANGE = 2**31 - 1
_ENVELOPE = frozenset({"custom_id", "method", "url", "body"})

ResolveModel = Callable[[str], str | None]
"""A model name as users write it -> the registered model, or None. Called with arbitrary strings of at most 256 characters."""


@dataclass(frozen=True, slots=True)
class LineRules:
    """What lines are checked against."""

    endpoint: str
    resolve_model: ResolveModel
    max_lines: int = 50_000
    max_line_bytes: int = 4 << 20
    max_json_depth: int = 100


@dataclass(frozen=True, slots=True)
class CheckedLine:
    """A line and the verdict: with `error` it must not be run; without, `body` is its request and `staged.model` the resolved model."""

    staged: StagedLine
    error: InputError | None = None
    body: dict[str, Any] | None = None


class InputRefused(Exception):
    """The file as a whole cannot be run, whatever is asked for single bad lines."""

    def __init__(self, error: InputError) -> None:
        super().__init__(error.message)
        self.error = error


class _InvalidLine(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def check_lines(chunks: Iterable[bytes], rules: LineRules) -> Iterator[CheckedLine]:
    """Checks an input that arrives in portions of any size. Blank lines at its end are no lines.

    Raises:
        InputRefused: `empty_file` or `too_many_tasks`, when that is known.
    """
    blanks: list[RawLine] = []  # errors only if something follows; never more than rules.max_lines
    found = False
    for raw in _split(chunks, rules.max_line_bytes):
        if raw.blank:
            if raw.line_no <= rules.max_lines:
                blanks.append(raw)
            continue
        if raw.line_no > rules.max_lines:
            raise InputRefused(InputError("too_many_tasks", f"The file has more than the {rules.max_lines} lines that are allowed."))
        found = True
        yield from (check_line(blank, rules) for blank in blanks)
        blanks.clear()
        yield check_line(raw, rules)
    if not found:
        raise InputRefused(InputError("empty_file", "The file holds no requests."))


def check_line(raw: RawLine, rules: LineRules) -> CheckedLine:
    """The verdict on one line; never raises. `custom_id` is kept wherever it could be read, so that a refusal can be matched to it."""
    custom_id = None
    try:
        record = _record(raw, rules)
        custom_id = _custom_id(record)
        body = _body(record, rules.endpoint)
        model = _model(body, rules.resolve_model)
    except _InvalidLine as problem:
        staged = StagedLine(raw.line_no, raw.offset, min(raw.length, _LONGEST_RANGE), custom_id)
        return CheckedLine(staged, InputError(problem.code, problem.message, raw.line_no, problem.param))
    size = expected_tokens(raw.length, body)
    return CheckedLine(StagedLine(raw.line_no, raw.offset, raw.length, custom_id, model, prefix_key(body), size), body=body)


def duplicate_error(line_no: int, first_line_no: int, custom_id: str) -> InputError:
    """The error of a line that repeats the custom_id of an earlier one."""
    return InputError("duplicate_custom_id", f"custom_id {show(custom_id)} was already used in line {first_line_no}.", line_no, "custom_id")


class ErrorList:
    """The first errors of a file, and a count of the rest: a hostile file cannot grow it."""

    def __init__(self, limit: int = 100) -> None:
        self._limit = limit
        self._first: list[InputError] = []
        self._more = 0

    def __bool__(self) -> bool:
        return bool(self._first)

    def add(self, error: InputError) -> None:
        if len(self._first) < self._limit:
            self._first.append(error)
        else:
            self._more += 1

    def as_tuple(self) -> tuple[InputError, ...]:
        """Ascending by line; a last entry without a line says how many are left out."""
        errors = tuple(sorted(self._first, key=lambda error: error.line or 0))
        if not self._more:
            return errors
        return (*errors, InputError("more_errors", f"{self._more} more errors are not listed; the first {self._limit} are."))


def _split(chunks: Iterable[bytes], max_line_bytes: int) -> Iterator[RawLine]:
    splitter = LineSplitter(max_line_bytes)
    for chunk in chunks:
        yield from splitter.feed(chunk)
    yield from splitter.finish()


def _record(raw: RawLine, rules: LineRules) -> dict[str, Any]:
    if raw.data is None:
        raise _InvalidLine("line_too_long", f"The line is {raw.length} bytes long; at most {rules.max_line_bytes} are allowed.")
    if raw.blank:
        raise _InvalidLine("invalid_json_line", "The line is blank; every line must be a JSON object.")
    try:
        record = strict_loads(raw.data, max_depth=rules.max_json_depth)
    except InvalidJson as error:
        raise _InvalidLine("invalid_json_line", f"The line is not valid JSON: {error}.") from None
    if not isinstance(record, dict):
        raise _InvalidLine("invalid_json_line", f"The line is {_kind(record)}; every line must be a JSON object.")
    return record


def _custom_id(record: dict[str, Any]) -> str:
    if "custom_id" not in record:
        raise _InvalidLine("invalid_custom_id", "custom_id is missing; every line needs one of its own.", "custom_id")
    value = record["custom_id"]
    if not isinstance(value, str):
        raise _InvalidLine("invalid_custom_id", f"custom_id must be a string, got {show(value)}.", "custom_id")
    if not 1 <= len(value) <= MAX_CUSTOM_ID:
        raise _InvalidLine("invalid_custom_id", f"custom_id has {len(value)} characters; allowed are 1 to {MAX_CUSTOM_ID}.", "custom_id")
    if "\x00" in value:  # PostgreSQL's text holds every character but this one
        raise _InvalidLine("invalid_custom_id", "custom_id contains the character U+0000, which is not allowed.", "custom_id")
    return value


def _body(record: dict[str, Any], endpoint: str) -> dict[str, Any]:
    if record.get("method") != "POST":
        raise _InvalidLine("invalid_method", f'method must be "POST", got {show(record.get("method"))}.', "method")
    if record.get("url") != endpoint:
        raise _InvalidLine("url_mismatch", f"url must be {show(endpoint)}, the batch's endpoint, got {show(record.get('url'))}.", "url")
    body = record.get("body")
    if not isinstance(body, dict):
        raise _InvalidLine("invalid_body", f"body must be an object, got {_kind(body)}.", "body")
    unknown = next((key for key in record if key not in _ENVELOPE), None)
    if unknown is not None:
        raise _InvalidLine("unknown_field", f"{show(unknown)} is not a field of a batch line; allowed are {', '.join(sorted(_ENVELOPE))}.")
    return body


def _model(body: dict[str, Any], resolve: ResolveModel) -> str:
    name = body.get("model")
    model = resolve(name) if isinstance(name, str) and len(name) <= MAX_MODEL_NAME else None
    if model is None:
        raise _InvalidLine(
            "model_not_found", f"The model {show(name)} does not exist here; GET /v1/models lists those that do.", "body.model"
        )
    return model


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}.get(type(value), "a number")
