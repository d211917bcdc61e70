"""Token counts: what a line is billed for, and what it made the machine do."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Usage:
    """OpenAI's usage. `input_tokens` includes `cached_tokens`; `output_tokens` includes reasoning and the end token."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Work:
    """What delivering a line cost (the engine's token ledger; tokens, and device time in nanoseconds)."""

    prompt: int = 0
    cached: int = 0
    prefilled: int = 0
    recomputed: int = 0
    generated: int = 0
    sampled: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    steps: int = 0
    prefill_ns: int = 0
    draft_ns: int = 0
    decode_ns: int = 0
    plain_ns: int = 0
    """What decoding the same tokens one at a time would have taken, according to the engine's cost model: an estimate."""
    modelled_ns: int = 0
    """What the cost model expected of the decoding that was really done; held against `decode_ns` it tells how far off the model is."""

    @property
    def device_ns(self) -> int:
        return self.prefill_ns + self.draft_ns + self.decode_ns

    @property
    def pruned(self) -> int:
        return self.drafted - self.verified

    @property
    def rejected(self) -> int:
        return self.verified - self.accepted

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))
