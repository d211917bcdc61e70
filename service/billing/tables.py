"""Cells that leave for a spreadsheet."""

from __future__ import annotations

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def formula_safe(text: str) -> str:
    """`text` so that no spreadsheet runs it: a leading apostrophe before what would start a formula. Numbers go out as they are."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text
