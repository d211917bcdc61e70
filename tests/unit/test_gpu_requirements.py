"""The tests for a GPU ask for nothing but what a bare machine has: torch, triton, transformers, safetensors, numpy, pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

ALONE = """
import importlib.machinery, importlib.metadata as metadata, re, sys

def closure(names):
    found, left = set(), list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name not in found:
            try:
                needs = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            found.add(name)
            left += [re.match(r"[\\w.-]+", need)[0] for need in needs if "extra ==" not in need]
    return found

there = closure(["torch", "triton", "transformers", "safetensors", "numpy", "pytest"])
dists = metadata.packages_distributions()
known = {top for top, names in dists.items() if {re.sub(r"[-_.]+", "-", n).lower() for n in names} & there}
known |= set(sys.stdlib_module_names) | {"tests", "engine", "kernels", "conftest"}
path = importlib.machinery.PathFinder.find_spec

def find_spec(cls, name, *arguments):
    return path(name, *arguments) if name.partition(".")[0] in known else None

importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
sys.meta_path = [finder for finder in sys.meta_path if "ditable" not in str(finder)]
import pytest
code = pytest.main(["tests/gpu", "-q", "-p", "no:cacheprovider"])
assert not any(name.partition(".")[0] in ("service", "psycopg", "celery", "hypothesis") for name in sys.modules)
sys.exit(code)
"""
"""Runs them as if only these packages and what they require were installed."""


def test_they_are_collected_without_anything_else() -> None:
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", ALONE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "error" not in done.stdout
    assert "skipped" in done.stdout  # no GPU here; on one they run


def test_the_engines_tests_for_a_gpu_pass_with_calls_in_place_of_captures() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.unit.gpu_on_cpu", "-p", "no:cacheprovider", "tests/gpu/test_engine.py"]
    command += ["tests/gpu/test_runner.py", "-k", "not captured_pipeline"]  # that one compares captures with calls
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout
