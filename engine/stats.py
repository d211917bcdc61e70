"""Counters of a running engine, and the snapshot that other threads read."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

_WINDOW_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One moment of an engine. `tokens_per_second` covers about the last ten seconds; counters run from the engine's start.

    `acceptance_length`: tokens sampled per request and step in which it sampled, 1 without speculation.
    `busy_ns`: time of forwards, sampling and drafting; the ledgers' three times sum to it once every request has ended.
    """

    running: int = 0
    waiting: int = 0
    finished: int = 0
    tokens_per_second: float = 0.0
    kv_blocks: int = 0
    kv_blocks_held: int = 0
    kv_blocks_peak: int = 0
    """The most that were ever held."""
    steps: int = 0
    step_tokens: int = 0
    sampled: int = 0
    sampling_steps: int = 0
    generated: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    preemptions: int = 0
    busy_ns: int = 0
    first_token_ns: int = 0
    """From the start of the first step to the first token that was sampled; 0 until then."""

    @property
    def acceptance_length(self) -> float:
        return self.sampled / self.sampling_steps if self.sampling_steps else 0.0

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that running requests hold, 0 to 1."""
        return self.kv_blocks_held / self.kv_blocks if self.kv_blocks else 0.0


class Meter:
    """Keeps the latest `EngineStats`. One thread writes; reading `stats` from any other is safe, for it is replaced whole."""

    def __init__(self, kv_blocks: int) -> None:
        self.stats = EngineStats(kv_blocks=kv_blocks)
        self._window: deque[tuple[float, int]] = deque()
        self._began: float | None = None

    def resize(self, kv_blocks: int) -> None:
        """The cache has another number of blocks now."""
        self.stats = replace(self.stats, kv_blocks=kv_blocks)

    def add(self, now: float, *, running: int, waiting: int, kv_blocks_held: int, preemptions: int, finished: int, **counts: int) -> None:
        """Adds one step's `counts` (names of `EngineStats` counters) and sets the gauges. `now`: seconds of a monotonic clock."""
        old = self.stats
        if self._began is None:
            self._began = now - counts.get("busy_ns", 0) * 1e-9
        first_token_ns = old.first_token_ns
        if not first_token_ns and counts.get("sampled", 0):
            first_token_ns = int((now - self._began) * 1e9)
        generated = old.generated + counts.get("generated", 0)
        self._window.append((now, generated))
        while len(self._window) > 2 and now - self._window[0][0] > _WINDOW_SECONDS:
            self._window.popleft()
        since, before = self._window[0]
        self.stats = replace(
            old,
            running=running,
            waiting=waiting,
            kv_blocks_held=kv_blocks_held,
            kv_blocks_peak=max(old.kv_blocks_peak, kv_blocks_held),
            preemptions=preemptions,
            finished=finished,
            first_token_ns=first_token_ns,
            tokens_per_second=(generated - before) / (now - since) if now > since else 0.0,
            **{name: getattr(old, name) + count for name, count in counts.items()},
        )
