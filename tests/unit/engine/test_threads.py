"""How OpenMP's threads wait is settled before torch is loaded, and is the operator's to choose."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ({}, "PASSIVE 10000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"GOMP_SPINCOUNT": "7"}, "PASSIVE 7"),
    ],
)
def test_idle_threads_spin_for_a_moment_unless_the_operator_chose(chosen: dict[str, str], found: str) -> None:
    program = (
        "from engine.threads import wait_politely; wait_politely(); "
        "import os; print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'))"
    )
    inherited = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", program], env=inherited | chosen, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found
