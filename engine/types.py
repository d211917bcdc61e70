"""What goes into the engine and what comes out: plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a request stopped. `STOP` and `LENGTH` carry an answer, the other two do not."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    ERROR = "error"


class GrammarKind(StrEnum):
    """How a grammar's text is to be read."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    """The whole answer matches it."""
    CALLS = "calls"
    """A JSON array of `{"before", "schema", "after"}`: the answer is the JSON of one of them, between its two fixed texts."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form that an answer must have. Equal ones are compiled once."""

    kind: GrammarKind
    text: str


COLDEST = 1e-5
"""Below this temperature sampling is greedy: float32 logits divided by less run out of range, and nothing but ties would be drawn."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. `temperature < COLDEST` is greedy; `top_k == 0` and `top_p == 1` are off.

    `seed` makes the text a function of (prompt, params, model) alone, whatever else shares the batch; `sample` tells several answers to
    one prompt under one seed apart. Penalties and `logit_bias` (token, added to its logit) change logits before temperature, see
    `engine.logit_rules`. Before `min_tokens` tokens nothing ends the answer.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    sample: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    """None: no log-probabilities; else those of the answer's tokens, with so many of the likeliest beside each."""
    prompt_logprobs: bool = False
    """The prompt's too, from its second token on. Its KV is then computed whole: nothing known is shared."""
    grammar: Grammar | None = None
    """Every answer that ends by itself has this form."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not self.repetition_penalty > 0.0:
            raise ValueError(f"repetition_penalty must be more than 0, got {self.repetition_penalty}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens must be from 0 to max_tokens ({self.max_tokens}), got {self.min_tokens}")
        if self.grammar is not None and (self.ignore_eos or self.min_tokens):
            raise ValueError("a grammar says where the answer ends, so it takes neither ignore_eos nor min_tokens")
        if self.prompt_logprobs and self.logprobs is None:
            raise ValueError("prompt_logprobs needs logprobs, which says how many tokens to name beside each; 0 will do")

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST

    @property
    def penalises(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def changes_logits(self) -> bool:
        return self.penalises or bool(self.logit_bias) or self.min_tokens > 0


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue.

    `template` names requests that were written from one pattern (same system prompt, say): siblings share
    length statistics and draft for each other. `drafter` is `auto`, `off` or a registered name. `deadline` is a number
    that only has to be comparable with the other requests' (Unix seconds, say); lower is sooner. Several requests may have one `id`
    (answers to one line, say), told apart by `choice`; aborting it ends them all.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    template: str | None = None
    priority: int = 0
    deadline: float | None = None
    drafter: str = "auto"
    choice: int = 0


@dataclass(slots=True)
class TokenLedger:
    """Where the work of one request went. Token counts unless the name says nanoseconds.

    Conserved (tested): `drafted == verified + pruned`, `verified == accepted + rejected`,
    `prompt == cached + prefilled` for a request that was never preempted; recomputed positions count in `recomputed`.
    `sampled` counts every token the target model produced, end token included: `sampled == generated + dropped`, where
    `dropped` came after a stop string or the end token inside an accepted block.
    The device time of a step is shared out over the requests of that step, so the three times sum to busy time.
    """

    prompt: int = 0
    cached: int = 0
    prefilled: int = 0
    recomputed: int = 0
    generated: int = 0
    sampled: int = 0
    dropped: int = 0
    drafted: int = 0
    verified: int = 0
    pruned: int = 0
    accepted: int = 0
    rejected: int = 0
    steps: int = 0
    """Forward passes in which this request sampled: (generated + dropped) / steps is its acceptance length."""
    prefill_ns: int = 0
    draft_ns: int = 0
    decode_ns: int = 0
    """Target forward time spent on decoding and verification."""
    plain_ns: int = 0
    """What the cost model says that decoding the same tokens without drafts would have taken (an estimate of `decode_ns` + `draft_ns`)."""
    modelled_ns: int = 0
    """What the cost model says of the decoding steps as they were: against `decode_ns` it shows the model's error."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log-probability under the model, and the likeliest tokens in its place: (token, log-probability), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a request. `token_ids` includes the end token (it is billed), `text` does not."""

    id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    ledger: TokenLedger = field(default_factory=TokenLedger)
    drafter: str | None = None
    error: str | None = None
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    """One entry a token of `token_ids`, where the request wanted them."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """One entry a prompt token from the second on, where the request wanted them."""
