"""One request on its way through the engine: its tokens, its blocks, and how far its KV is computed. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.types import Request, TokenLedger

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Sequence:
    """`tokens[:num_tokens]` are prompt and confirmed output; KV is valid for the first `num_computed` of them.

    A running sequence always has `num_computed < num_tokens`: what is left is its prompt (or, after a preemption, all of
    it), or, once it is `decoding`, just the last sampled token. Drafted tokens are never part of it: rejecting them moves no
    number here.

    The last `promised` tokens are on the device and not known here yet: they count, and hold 0 until they are fulfilled.
    """

    __slots__ = (
        "_buffer",
        "blocks",
        "decoding",
        "high_water",
        "ledger",
        "limit",
        "num_computed",
        "num_matched",
        "num_published",
        "num_tokens",
        "private",
        "promised",
        "prompt_length",
        "request",
        "serial",
        "slot",
    )

    def __init__(self, request: Request, serial: int, max_positions: int) -> None:
        self.request = request
        self.serial = serial
        self.prompt_length = len(request.prompt_token_ids)
        self.limit = min(self.prompt_length + request.sampling.max_tokens, max_positions)
        """Tokens (prompt included) at which the sequence ends at the latest."""
        self._buffer: NDArray[np.int64] = np.empty(min(self.limit, self.prompt_length + 128), np.int64)
        self._buffer[: self.prompt_length] = request.prompt_token_ids
        self.num_tokens = self.prompt_length
        self.ledger = TokenLedger(prompt=self.prompt_length)
        self.slot = -1
        """Row in the block table while running, -1 otherwise."""
        self.high_water = 0
        """Positions that were ever computed: below it, computing again is recomputation."""
        self.promised = 0
        self.leave()

    def leave(self) -> None:
        """Forgets everything that depends on held blocks."""
        self.blocks: list[int] = []
        self.num_computed = 0
        self.num_matched = 0
        self.num_published = 0
        self.private = False
        """Its next full block duplicates one that somebody else is computing: keep what follows out of the tree."""
        self.decoding = False
        self.slot = -1

    @property
    def tokens(self) -> NDArray[np.int64]:
        """int64 [num_tokens], a view."""
        return self._buffer[: self.num_tokens]

    @property
    def output(self) -> NDArray[np.int64]:
        """int64 [generated], a view."""
        return self._buffer[self.prompt_length : self.num_tokens]

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.prompt_length

    @property
    def room(self) -> int:
        """Tokens that may still be generated."""
        return self.limit - self.num_tokens

    def reach(self, position: int) -> int:
        """Notes that KV up to `position` was valid once; returns how many *prompt* tokens that covers for the first time."""
        before, self.high_water = self.high_water, max(self.high_water, position)
        return max(0, min(self.high_water, self.prompt_length) - before)

    def append(self, tokens: NDArray[np.int64]) -> None:
        end = self.num_tokens + len(tokens)
        if end > len(self._buffer):
            grown = np.empty(max(end, min(self.limit, 2 * len(self._buffer))), np.int64)
            grown[: self.num_tokens] = self.tokens
            self._buffer = grown
        self._buffer[self.num_tokens : end] = tokens
        self.num_tokens = end

    def promise(self) -> None:
        """One token more, which a step that was launched will sample."""
        self.append(np.zeros(1, np.int64))
        self.promised += 1

    def fulfil(self, token: int) -> None:
        """The oldest promised token is this one."""
        self._buffer[self.num_tokens - self.promised] = token
        self.promised -= 1

    def retract(self) -> None:
        """What was promised is not wanted any more."""
        self.num_tokens -= self.promised
        self.promised = 0
