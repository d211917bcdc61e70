"""Child processes that are kept running: started, watched, started again after a growing pause, ended politely."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

HEALTHY_SECONDS = 30.0
"""A child that lived this long has recovered: its next failure starts the pauses over."""

_PR_SET_PDEATHSIG = 1
_LOG_ROTATE_BYTES = 16 << 20


@dataclass(slots=True)
class Backoff:
    """Pauses between failures, doubling from `first` to `longest` seconds. Pure: the caller brings the time."""

    first: float = 0.5
    longest: float = 30.0
    failures: int = 0
    not_before: float = 0.0

    def failed(self, now: float, lived: float) -> float:
        """Notes a failure after `lived` seconds of life; returns the pause before the next start."""
        self.failures = 1 if lived >= HEALTHY_SECONDS else self.failures + 1
        pause = min(self.first * 2.0 ** (self.failures - 1), self.longest)
        self.not_before = now + pause
        return pause

    def succeeded(self) -> None:
        self.failures, self.not_before = 0, 0.0


@dataclass(slots=True)
class Child:
    """One process and how to start it. Its output goes to `log`, appended; without one, to where this process's goes."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path | None
    pass_fds: tuple[int, ...] = ()
    backoff: Backoff = field(default_factory=Backoff)
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0

    def start(self) -> None:
        """A session of its own: a Ctrl-C at the terminal reaches the supervisor alone, which then ends the children in order."""
        if self.log is None:
            self._start(None)
        else:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            if self.log.exists() and self.log.stat().st_size > _LOG_ROTATE_BYTES:
                self.log.replace(self.log.with_suffix(".1.log"))
            with self.log.open("ab") as out:
                self._start(out)
        self.started = time.monotonic()

    def _start(self, out: BinaryIO | None) -> None:
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
            self.command,
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if out else None,
            start_new_session=True,
            pass_fds=self.pass_fds,
        )

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def ended(self) -> int | None:
        """The exit status (negative: the signal) of a process that has ended and was not asked about before."""
        if self.process is None or (status := self.process.poll()) is None:
            return None
        self.process = None
        return status

    def ask_to_stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def last_words(self) -> str:
        """The last line of the log that says something."""
        if self.log is None:
            return ""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4096))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
            return lines[-1].strip() if lines else ""
        return ""


def stop_all(children: Iterable[Child], grace: float) -> None:
    """Asks all at once, waits up to `grace` seconds for all of them together, then kills what is left."""
    asked = [child for child in children if child.running]
    for child in asked:
        child.ask_to_stop()
    deadline = time.monotonic() + grace
    for child in asked:
        assert child.process is not None
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()


def describe_exit(status: int) -> str:
    """A negative status is a signal, as subprocess reports it."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def process_age_ns() -> int:
    """How long this process has been running, by the kernel's count (10 ms steps); 0 where the kernel does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of the whole line, in ticks since boot
    return max(0, int((time.clock_gettime(time.CLOCK_BOOTTIME) - started) * 1e9))


def die_with(parent_pid: int) -> None:
    """Linux sends this process SIGTERM when its parent ends, so a killed supervisor leaves nothing behind.

    Called in the child, not between fork and exec, where only async-signal-safe calls are allowed; the parent may have died before, hence
    the second look.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGTERM)
