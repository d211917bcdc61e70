"""What a request asks of the model, held against it before it is queued."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.grammars import GrammarConstraint
from engine.scheduler import UnfitRequestError

if TYPE_CHECKING:
    from engine.batch import ModelSpec
    from engine.grammars import Compiler
    from engine.logit_rules import Constraint
    from engine.tokenizer import Tokenizer
    from engine.types import Request


def check_vocabulary(request: Request, vocab_size: int) -> None:
    """Raises UnfitRequestError where it names a token that the model does not have."""
    sampling = request.sampling
    named = {
        "prompt": request.prompt_token_ids,
        "logit_bias": tuple(token for token, _ in sampling.logit_bias),
        "stop_token_ids": sampling.stop_token_ids,
    }
    for name, tokens in named.items():
        low, high = min(tokens, default=0), max(tokens, default=0)
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise UnfitRequestError(f"{name} token {wrong} is outside the model's vocabulary of {vocab_size}")


def constraint_of(request: Request, spec: ModelSpec, grammars: Compiler, tokenizer: Tokenizer) -> Constraint | None:
    """What holds the answer to its form, if there is one: waits until its grammar is compiled. Raises GrammarError, UnfitRequestError."""
    grammar = request.sampling.grammar
    if grammar is None:
        return None
    if not spec.eos_token_ids:
        raise UnfitRequestError("this model has no end token, so no answer of a given form could end")
    compiled = grammars.compile(grammar)
    from engine.grammars.backend import Matcher

    return GrammarConstraint(Matcher(compiled, len(grammars.vocabulary.tokens)), grammars.vocabulary, tokenizer.encode_piece)
