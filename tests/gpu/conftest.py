"""A test that takes too long says where it is, fails, and lets the others run."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import pytest
import torch

SECONDS = 100
"""Many times what a test takes, compiling its kernels included. `faulthandler_timeout` in pytest.ini prints all stacks well before."""
GRACE = 20
"""What an exception has to come through; a call that waits for the device and never returns lets none through."""


@pytest.fixture(autouse=True)
def gives_up(request: pytest.FixtureRequest) -> Iterator[None]:
    """Raises TimeoutError in the test after SECONDS; ends the process (under xdist the worker, which is replaced) GRACE later.

    Without a GPU nothing waits for one, and a machine that is busy elsewhere takes as long as it takes.
    """
    if not torch.cuda.is_available():
        yield
        return

    def late(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        raise TimeoutError(f"{request.node.name} takes longer than {SECONDS} s")

    def stuck() -> None:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{request.node.nodeid} cannot be stopped\n".encode())
        os._exit(1)

    hard = threading.Timer(SECONDS + GRACE, stuck)
    hard.daemon = True
    hard.start()
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        hard.cancel()
