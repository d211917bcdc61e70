"""A grammar's hold on one answer: which tokens may come at each verified place, which drafts cannot stand, and which are forced."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from engine.grammars.backend import Matcher
    from engine.grammars.vocabulary import Vocabulary

    Ints = NDArray[np.int64]

PATIENCE_SECONDS, SECONDS_A_TOKEN = 3.0, 0.02
"""CPU time of following an answer, at first and for each token. Most forms take 0.0001 s a token; some patterns take 1 s."""
SURE, INNER, LAST = range(3)
"""How a forced token came about: nothing else is allowed; inside a text that is certain; its last token, which may merge with the next."""


class GrammarConstraint:
    """Implements `engine.logit_rules.Constraint`. Follows the confirmed answer; what it looks at beyond is rolled back."""

    def __init__(self, matcher: Matcher, vocabulary: Vocabulary, encode: Callable[[str], list[int]]) -> None:
        """encode: a piece of text as the model's tokens."""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._encode = encode
        self._seen = 0
        self._spent = 0.0

    @property
    def too_slow(self) -> bool:
        """Whether it holds up everybody else: it has taken more time than any sensible form."""
        return self._spent > PATIENCE_SECONDS + SECONDS_A_TOKEN * self._seen

    def masks(self, output: Ints, drafts: Ints) -> NDArray[np.int32]:
        """See `Constraint.masks`. Rows that nobody will read allow everything."""
        started = time.thread_time()
        self._follow(output)
        matcher = self._matcher
        rows = np.full((len(drafts) + 1, -(-len(self._vocabulary.tokens) // 32)), -1, np.int32)
        taken = 0
        for row, token in enumerate([*drafts.tolist(), None]):
            rows[row] = matcher.allowed()
            if token is None or not matcher.take(token):
                break
            taken += 1
            if matcher.ended:
                break
        matcher.back(taken)
        self._spent += time.thread_time() - started
        return rows

    def legal(self, output: Ints, drafts: Ints) -> int:
        """How many leading `drafts` may come after `output`."""
        self._follow(output)
        taken = 0
        for token in drafts.tolist():
            if self._matcher.ended or not self._matcher.take(token):
                break
            taken += 1
        self._matcher.back(taken)
        return taken

    def forced(self, output: Ints, limit: int) -> tuple[list[int], list[int]]:
        """Up to `limit` tokens that spell out what must come after `output`, and how each came about."""
        started = time.thread_time()
        self._follow(output)
        tokens: list[int] = []
        kinds: list[int] = []
        while len(tokens) < limit and not self._matcher.ended:
            more, how = self._next()
            taken = 0
            while taken < len(more) and len(tokens) < limit and self._matcher.take(more[taken]):
                tokens.append(more[taken])
                kinds.append(how[taken])
                taken += 1
            if not taken:
                break
        self._matcher.back(len(tokens))
        self._spent += time.thread_time() - started
        return tokens, kinds

    def _next(self) -> tuple[list[int], list[int]]:
        text = self._matcher.certain_text()
        if text:
            tokens = self._encode(text)
            if b"".join(self._vocabulary.tokens[token] for token in tokens) == text.encode():
                return tokens, [INNER] * (len(tokens) - 1) + [LAST]
        mask = self._matcher.allowed().view(np.uint32)
        words = np.flatnonzero(mask)
        if len(words) != 1 or int(mask[words[0]]).bit_count() != 1:
            return [], []
        return [32 * int(words[0]) + int(mask[words[0]]).bit_length() - 1], [SURE]

    def _follow(self, output: Ints) -> None:
        for token in output[self._seen :].tolist():
            if not self._matcher.take(token):
                raise RuntimeError(f"token {token} was confirmed at place {self._seen} of an answer whose grammar forbids it")
            self._seen += 1
