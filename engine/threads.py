"""How the CPU threads of torch wait for each other."""

from __future__ import annotations

import os
import sys

_SPINS = "10000"
"""About 0.1 ms: a step's products follow each other within less, so threads are still awake for the next."""


def wait_politely() -> None:
    """Lets idle OpenMP threads spin for a moment and then sleep. Without effect once torch is loaded, or where the operator chose.

    On a machine that has other work too, a thread that spins on takes the core from the one it waits for: with two threads and a load
    of six on two cores a decode step of eight sequences took 1,500 ms spinning and 100 ms sleeping. One that sleeps at once has to be
    woken for every product: a job of eight sequences took 15% longer on a quiet machine, and was no faster under load. Spins are counted
    by GNU's OpenMP, which torch's wheels for Linux come with.
    """
    if "torch" not in sys.modules:
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
