"""From a job's submission to its first result on a worker that had to load the model: where the time went. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

NANO = 10**9


@dataclass(frozen=True, slots=True)
class StartTimes:
    """What is known of a start. Times are the database's, durations nanoseconds of the worker's own clock."""

    submitted_at: datetime
    due_at: datetime
    claimed_at: datetime
    first_result_at: datetime
    spawn_ns: int
    load_ns: int
    profile_ns: int
    prefill_ns: int
    decode_ns: int


@dataclass(frozen=True, slots=True)
class StartSplit:
    """Nanoseconds; the parts sum to `total`.

    `validate`: until groups were due. `wait`: until a process for them was started. `spawn`: until that process could claim. `prefill`: the
    first step to the first token. `decode`: to the commit of the first results. `other`: what no meter knows.
    """

    total: int
    validate: int
    wait: int
    spawn: int
    load: int
    profile: int
    prefill: int
    decode: int

    @property
    def other(self) -> int:
        return self.total - (self.validate + self.wait + self.spawn + self.load + self.profile + self.prefill + self.decode)


def split(times: StartTimes) -> StartSplit:
    """A worker that was up before the job counts the part of its spawning that the job waited for: often none."""
    until_claimed = max(0, _ns(times.claimed_at - times.due_at))
    spawn = min(times.spawn_ns, until_claimed)
    return StartSplit(
        total=_ns(times.first_result_at - times.submitted_at),
        validate=_ns(times.due_at - times.submitted_at),
        wait=until_claimed - spawn,
        spawn=spawn,
        load=times.load_ns,
        profile=times.profile_ns,
        prefill=times.prefill_ns,
        decode=times.decode_ns,
    )


def _ns(duration: timedelta) -> int:
    return duration // timedelta(microseconds=1) * 1000
