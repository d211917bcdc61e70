"""What training and judging say while they run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Report:
    """tell: takes a line for people. tick: takes the name of what is counted (answers, steps), how many are done, and of how many."""

    tell: Callable[[str], None] = lambda _: None
    tick: Callable[[str, int, int], None] = lambda what, done, of: None  # noqa: ARG005 - names for the reader


SILENT = Report()
