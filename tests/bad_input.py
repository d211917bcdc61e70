"""Every kind of bad file content, with what each gets: one table for the pure checks and for the service as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

ENDPOINT = "/v1/chat/completions"
MODEL = "smollm2-135m"


def good(custom_id: str = "good", **changes: object) -> bytes:
    """A line that passes every check; `changes` replace parts of the envelope, None removes them."""
    record = {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body(), **changes}
    return orjson.dumps({key: value for key, value in record.items() if value is not None})


def body(**changes: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4, **changes}


def inside_body(text: bytes) -> bytes:
    """A good line whose body has `text` as a further member, verbatim."""
    return good().replace(b'"max_tokens":4', b'"max_tokens":4,' + text)


@dataclass(frozen=True)
class BadLine:
    """A single bad line: the code it gets, and words its message must hold."""

    name: str
    line: bytes
    code: str
    says: str
    custom_id: str | None = "good"
    """The custom_id that can still be read from it."""


BAD_LINES = (
    BadLine("blank", b"", "invalid_json_line", "blank", None),
    BadLine("only spaces", b" \t ", "invalid_json_line", "blank", None),
    BadLine("truncated JSON", good()[:-7], "invalid_json_line", "not valid JSON", None),
    BadLine("two objects", good() + good(), "invalid_json_line", "unexpected content after document", None),
    BadLine("array", b"[" + good() + b"]", "invalid_json_line", "an array", None),
    BadLine("string", b'"hello"', "invalid_json_line", "a string", None),
    BadLine("bad UTF-8", inside_body(b'"user":"\xff"'), "invalid_json_line", "byte 0xff", None),
    BadLine("overlong UTF-8", inside_body(b'"user":"\xc0\xaf"'), "invalid_json_line", "byte 0xc0", None),
    BadLine("encoded surrogate", inside_body(b'"user":"\xed\xa0\x80"'), "invalid_json_line", "byte 0xed", None),
    BadLine("UTF-16", good().decode().encode("utf-16-le"), "invalid_json_line", "UTF-16", None),
    BadLine("UTF-16 with BOM", good().decode().encode("utf-16"), "invalid_json_line", "UTF-16", None),
    BadLine("second BOM", b"\xef\xbb\xbf\xef\xbb\xbf" + good(), "invalid_json_line", "byte order mark", None),
    BadLine("raw NUL", inside_body(b'"user":"\x00"'), "invalid_json_line", "NUL", None),
    BadLine("raw control character", inside_body(b'"user":"\x01"'), "invalid_json_line", "control character", None),
    BadLine("lone surrogate", inside_body(b'"user":"\\ud800"'), "invalid_json_line", "surrogate", None),
    BadLine("NaN", inside_body(b'"temperature":NaN'), "invalid_json_line", "near", None),
    BadLine("Infinity", inside_body(b'"temperature":-Infinity'), "invalid_json_line", "near", None),
    BadLine("1e400", inside_body(b'"temperature":1e400'), "invalid_json_line", "infinity", None),
    BadLine("5,000-digit integer", inside_body(b'"seed":' + b"7" * 5000), "invalid_json_line", "infinity", None),
    BadLine(
        "duplicate key in the envelope",
        good()[:-1] + b',"custom_id":"other"}',
        "invalid_json_line",
        '"custom_id" occurs more than once',
        None,
    ),
    BadLine("duplicate key in the body", inside_body(b'"max_tokens":900'), "invalid_json_line", '"max_tokens" occurs more than once', None),
    BadLine("duplicate key by escape", inside_body(b'"max_tok\\u0065ns":900'), "invalid_json_line", "occurs more than once", None),
    BadLine("depth 101", inside_body(b'"x":' + b"[" * 99 + b"]" * 99), "invalid_json_line", "deeper than 100", None),
    BadLine("depth 100,000", inside_body(b'"x":' + b"[" * 100_000 + b"]" * 100_000), "invalid_json_line", "depth", None),
    BadLine("binary", bytes(b for b in range(256) if b not in b"\n"), "invalid_json_line", "NUL", None),
    BadLine("missing custom_id", good(custom_id=None), "invalid_custom_id", "missing", None),
    BadLine("empty custom_id", good(custom_id=""), "invalid_custom_id", "0 characters", None),
    BadLine("custom_id that is a number", good(custom_id=7), "invalid_custom_id", "got 7", None),
    BadLine("overlong custom_id", good(custom_id="x" * 513), "invalid_custom_id", "513 characters", None),
    BadLine("custom_id with U+0000", good(custom_id="a\x00b"), "invalid_custom_id", "U+0000", None),
    BadLine("wrong url", good(url="/v1/completions"), "url_mismatch", "/v1/completions"),
    BadLine("missing url", good(url=None), "url_mismatch", "null"),
    BadLine("wrong method", good(method="GET"), "invalid_method", '"GET"'),
    BadLine("missing method", good(method=None), "invalid_method", "null"),
    BadLine("missing body", good(body=None), "invalid_body", "null"),
    BadLine("body that is a string", good(body="hello"), "invalid_body", "a string"),
    BadLine("unknown field", good(priority=1), "unknown_field", '"priority"'),
    BadLine("missing model", good(body={"messages": []}), "model_not_found", "null"),
    BadLine("unknown model", good(body=body(model="gpt-99")), "model_not_found", "gpt-99"),
    BadLine("model that is a path", good(body=body(model="/etc/passwd")), "model_not_found", "/etc/passwd"),
    BadLine("model that climbs", good(body=body(model="../" + MODEL)), "model_not_found", "../"),
    BadLine("model that is a URL", good(body=body(model="https://example.com/m")), "model_not_found", "https://example.com/m"),
    BadLine("model that is a number", good(body=body(model=5)), "model_not_found", "5"),
)

ACCEPTED = {
    "a leading BOM": b"\xef\xbb\xbf" + good("a") + b"\n" + good("b") + b"\n",
    "CRLF": good("a") + b"\r\n" + good("b") + b"\r\n",
    "U+2028 and U+2029 inside strings": good("a\u2028") + b"\n" + good("b\u2029") + b"\n",
    "no final newline": good("a") + b"\n" + good("b"),
    "blank lines at the end": good("a") + b"\n" + good("b") + b"\n\n \r\n",
    "depth 100": inside_body(b'"x":' + b"[" * 98 + b"]" * 98) + b"\n" + good("b"),
    "a colon and quotes in text": good('a":"b') + b"\n" + good(":"),
}
"""Files of two lines each that pass."""
