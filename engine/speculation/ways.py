"""Whether drafting inside the device's steps or between them brings more tokens a second: measured on this job. No torch, no clock.

Between steps the host can choose among drafters, look texts up, and wait for neither where nothing pays; inside them one drafter drafts for
everybody and the host never waits. Which is faster depends on model, texts and batch, so both are tried and the faster one is kept; the
other is tried again from time to time, the more rarely the more often it lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_TRIAL = 16
"""Steps that a way is tried for."""
_PATIENCE, _MOST_PATIENCE = 512, 8192
"""Steps after which the slower way is tried again, first and at last: the next job may be of another kind."""
_FADE = 0.97
_AFRESH = 0.05
"""Of what is known of a way, when it is tried again."""
_CLEARLY = 1.02
"""How much faster the other way must be to be taken."""
_USUAL = 2.0
"""A step that took this many times the usual one says no more than that: something was captured in it, or the host was busy elsewhere."""


@dataclass(slots=True)
class _Record:
    """tokens, seconds: of recent steps, fading. steps: since its trial began; idle: of the other way since its last one."""

    tokens: float = 0.0
    seconds: float = 0.0
    weight: float = 0.0
    steps: int = 0
    idle: int = 0
    patience: int = _PATIENCE

    @property
    def rate(self) -> float:
        return self.tokens / max(self.seconds, 1e-12)

    def add(self, tokens: int, seconds: float) -> None:
        if self.weight:
            seconds = min(seconds, _USUAL * self.seconds / self.weight)
        self.tokens = _FADE * self.tokens + tokens
        self.seconds = _FADE * self.seconds + seconds
        self.weight = _FADE * self.weight + 1.0
        self.steps += 1
        self.idle = 0

    def try_again(self) -> None:
        self.tokens, self.seconds, self.weight = _AFRESH * self.tokens, _AFRESH * self.seconds, _AFRESH * self.weight
        self.steps, self.patience = 0, min(2 * self.patience, _MOST_PATIENCE)


@dataclass(slots=True)
class _Size:
    """Of one size of batch. device: which way is taken, once both are known."""

    host: _Record = field(default_factory=_Record)
    inside: _Record = field(default_factory=_Record)
    device: bool = True

    def record(self, on_device: bool) -> _Record:
        return self.inside if on_device else self.host


class Ways:
    """Batches of up to 1, 2, 4, 8 ... requests are told apart."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def add(self, *, on_device: bool, requests: int, tokens: int, seconds: float) -> None:
        """One step that only decoded: how many requests had a token in it, and what it brought in which time."""
        size = self._of(requests)
        size.record(on_device).add(tokens, seconds)
        size.record(not on_device).idle += 1

    def on_device(self, requests: int) -> bool:
        """Whether the next step of so many requests is better made on the device."""
        size = self._of(requests)
        device, host = size.record(True), size.record(False)
        if device.steps < _TRIAL or host.steps < _TRIAL:
            return device.steps < _TRIAL
        taken, other = size.record(size.device), size.record(not size.device)
        if other.rate > _CLEARLY * taken.rate:
            size.device, other.patience = not size.device, _PATIENCE
        elif other.idle >= other.patience:
            other.try_again()
            return not size.device
        return size.device

    def _of(self, requests: int) -> _Size:
        return self._sizes.setdefault(max(requests - 1, 0).bit_length(), _Size())
