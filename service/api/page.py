"""The documentation page: the OpenAPI description as plain HTML, without scripts and without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
code, pre { font: 14px ui-monospace, monospace; background: #f2f4f7; border-radius: 4px; padding: 1px 4px; }
details { border: 1px solid #d8dee6; border-radius: 6px; margin: .5rem 0; padding: .5rem .8rem; }
summary { cursor: pointer; } summary b { display: inline-block; width: 4.5rem; }
table { border-collapse: collapse; margin: .5rem 0; } td, th { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; }
"""


def render_page(spec: Mapping[str, Any]) -> str:
    """HTML for an OpenAPI 3 document."""
    return "".join(_parts(spec))


def _parts(spec: Mapping[str, Any]) -> Iterator[str]:
    info = spec["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
    yield f"<p>{escape(info['description'])}</p><p>For machines: <a href=/openapi.json><code>/openapi.json</code></a></p>"
    heading = None
    for path, operations in spec["paths"].items():
        for method, operation in operations.items():
            tag = operation["tags"][0]
            if tag != heading:
                heading = tag
                yield f"<h2>{escape(tag)}</h2>"
            yield _operation(method, path, operation)
    yield "<h2>Objects</h2>"
    for name, schema in spec["components"]["schemas"].items():
        yield f"<details id='{escape(name)}'><summary><code>{escape(name)}</code></summary>{_schema(schema)}</details>"


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    summary = f"<b>{method.upper()}</b><code>{escape(path)}</code> {escape(operation['summary'])}"
    parts = [f"<p>{escape(operation.get('description', ''))}</p>"]
    parameters = operation.get("parameters", [])
    if parameters:
        rows = "".join(_row(p["name"], f"{p['in']}, {_type(p['schema'])}", p.get("description"), p["required"]) for p in parameters)
        parts.append(f"<table>{rows}</table>")
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        parts.append(f"<p>Body: <code>{escape(media)}</code> {_type(schema)}</p>{_schema(schema) if 'properties' in schema else ''}")
    answers = "".join(_answer(status, answer) for status, answer in operation["responses"].items())
    return f"<details><summary>{summary}</summary>{''.join(parts)}<p>Answers</p><table>{answers}</table></details>"


def _answer(status: str, answer: Mapping[str, Any]) -> str:
    kinds = ", ".join(_type(content["schema"]) for content in answer.get("content", {}).values() if content.get("schema"))
    return _row(status, kinds, answer.get("description"), required=False)


def _schema(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    properties = schema.get("properties", {})
    rows = "".join(_row(name, _type(of), of.get("description"), name in required) for name, of in properties.items())
    return f"<p>{escape(schema.get('description', ''))}</p><table>{rows}</table>"


def _row(name: str, kind: str, description: str | None, required: bool) -> str:
    mark = " <small>required</small>" if required else ""
    return f"<tr><td><code>{escape(name)}</code>{mark}<td>{kind}<td>{escape(description or '')}"


def _type(schema: Mapping[str, Any]) -> str:
    """A type in a few words; objects link to their description."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(escape(repr(value)) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    return escape(str(schema.get("type", "any")))
