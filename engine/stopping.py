"""When an answer ends: end tokens, stop strings, length. Judges accepted tokens one by one, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.tokenizer import IncrementalDecoder, Tokenizer
from engine.types import FinishReason

if TYPE_CHECKING:
    from engine.sequence import Sequence


class StopWatch:
    """The end conditions of one sequence. Text is decoded along the way only where stop strings ask for it."""

    __slots__ = ("_cut", "_decoder", "_end_tokens", "_ended_by_token", "_stop", "_tokenizer", "_too_few", "end_tokens")

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...]) -> None:
        sampling = sequence.request.sampling
        self._tokenizer = tokenizer
        self.end_tokens = sampling.stop_token_ids + (() if sampling.ignore_eos else eos_token_ids)
        self._end_tokens = frozenset(self.end_tokens)
        self._too_few = sampling.min_tokens
        """Tokens that must still come before anything may end the answer."""
        self._stop = tuple(text for text in sampling.stop if text)
        self._decoder = IncrementalDecoder(tokenizer) if self._stop else None
        self._cut: int | None = None
        self._ended_by_token = False

    def scan(self, tokens: list[int], room: int) -> tuple[int, FinishReason | None]:
        """How many of newly accepted `tokens` belong to the answer (`room` at most), and why it ends there, if it does."""
        for index, token in enumerate(tokens[:room]):
            if token in self._end_tokens:
                self._ended_by_token = True
                return index + 1, FinishReason.STOP
            self._too_few -= 1
            if self._decoder is not None and self._hits_stop_string(token):
                return index + 1, FinishReason.STOP
        if len(tokens) >= room:
            return room, FinishReason.LENGTH
        return len(tokens), None

    def text(self, sequence: Sequence) -> str:
        """The answer so far: no end token, and nothing from a stop string on."""
        output = sequence.output.tolist()
        if self._cut is not None and self._decoder is not None:
            return self._decoder.text[: self._cut]
        return self._tokenizer.decode(output[:-1] if self._ended_by_token else output)

    def _hits_stop_string(self, token: int) -> bool:
        assert self._decoder is not None
        fresh = self._decoder.push(token)
        if not fresh or self._too_few > 0:
            return False
        text = self._decoder.text
        old = len(text) - len(fresh)
        # A place that ends in the old text was looked at before (and passed over, where the answer was too short).
        places = [place for stop in self._stop if (place := text.find(stop, max(0, old - len(stop) + 1))) >= 0]
        self._cut = min(places, default=None)
        return bool(places)
