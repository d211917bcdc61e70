"""How the CPU threads of torch wait for each other."""

from __future__ import annotations

import os
import sys


def wait_politely() -> None:
    """Lets idle OpenMP threads sleep instead of spin. Without effect once torch is loaded, or where the operator chose otherwise.

    On a machine that has other work too, a spinning thread takes the core from the one it waits for: with two threads and a load of six
    on two cores a decode step of eight sequences took 1,500 ms spinning and 100 ms sleeping.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
