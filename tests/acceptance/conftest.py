"""Options of the acceptance tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.acceptance.checks import DATA


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", type=Path, default=DATA, help="folder of the benchmark jobs (default: %(default)s)")
    parser.addoption("--lines", type=int, default=None, help="only the first so many lines of a job")
