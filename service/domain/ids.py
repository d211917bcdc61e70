"""Identifiers in OpenAI's shapes: a prefix and 32 hexadecimal digits, random unless derived."""

from __future__ import annotations

import hashlib
import secrets

PROJECT_PREFIX = "proj_"


def new_file_id() -> str:
    return f"file-{secrets.token_hex(16)}"


def new_batch_id() -> str:
    return f"batch_{secrets.token_hex(16)}"


def new_project_id() -> str:
    return f"{PROJECT_PREFIX}{secrets.token_hex(16)}"


def new_key_id() -> str:
    return f"key_{secrets.token_hex(16)}"


def copied_input_id(batch_id: str) -> str:
    """The file that a batch's `input_uri` is copied into: known before it exists."""
    return f"file-{_derived(batch_id, 0, 'input')}"


def batch_request_id(batch_id: str, line_no: int) -> str:
    """The `id` of an output line: the same however often the line is run."""
    return f"batch_req_{_derived(batch_id, line_no, 'line')}"


def request_id(batch_id: str, line_no: int) -> str:
    """The `response.request_id` of an output line."""
    return f"req_{_derived(batch_id, line_no, 'request')}"


def _derived(batch_id: str, line_no: int, kind: str) -> str:
    return hashlib.blake2b(f"{kind}:{batch_id}:{line_no}".encode(), digest_size=16).hexdigest()
