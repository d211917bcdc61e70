"""Sizes before anything is tokenised: good enough to order and to balance, never to bill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BYTES_PER_TOKEN = 4
"""English text under the byte-pair vocabularies of current models: 3.5 to 4.5 bytes a token."""

UNBOUNDED_ANSWER = 256
"""Tokens assumed for the answer of a request that sets no limit."""

_LARGEST = 2**31 - 1


def expected_tokens(line_bytes: int, body: Mapping[str, Any]) -> int:
    """Prompt tokens by size plus the answer's limit, where the body names a sane one. Never more than a 32-bit column holds."""
    limit = body.get("max_completion_tokens")
    if limit is None:
        limit = body.get("max_tokens")
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        limit = UNBOUNDED_ANSWER  # absent, or refused later when the line is run
    return min(line_bytes // BYTES_PER_TOKEN + limit, _LARGEST)
