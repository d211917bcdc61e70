"""The only file that knows xgrammar (Dong et al. 2024): compiling, and following a text token by token."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import xgrammar

from engine.grammars.errors import GrammarError
from engine.grammars.schema import normalised
from engine.types import Grammar, GrammarKind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.grammars.vocabulary import Vocabulary


def token_info(vocabulary: Vocabulary) -> Any:
    """The tokens as the compiler wants them."""
    return xgrammar.TokenizerInfo(
        list(vocabulary.tokens), xgrammar.VocabType.RAW, vocab_size=len(vocabulary.tokens), stop_token_ids=list(vocabulary.ends)
    )


def compile_grammar(info: Any, grammar: Grammar) -> str:
    """The compiled grammar as text, for `load`. Takes as long and as much as it takes. Raises GrammarError."""
    parsed = _parse(grammar)
    try:
        return str(xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False).compile_grammar(parsed).serialize_json())
    except (RuntimeError, ValueError, TypeError) as error:
        raise GrammarError(_reason(error)) from None


def load(info: Any, text: str) -> Any:
    """What `compile_grammar` made, for `Matcher`."""
    return xgrammar.CompiledGrammar.deserialize_json(text, info)


def _parse(grammar: Grammar) -> Any:
    try:
        if grammar.kind is GrammarKind.REGEX:
            return xgrammar.Grammar.from_regex(grammar.text)
        if grammar.kind is GrammarKind.JSON_SCHEMA:
            return _schema(json.loads(grammar.text))
        parts = [
            xgrammar.Grammar.concat(_literal(call["before"]), _schema(call["schema"]), _literal(call["after"]))
            for call in json.loads(grammar.text)
        ]
        return parts[0] if len(parts) == 1 else xgrammar.Grammar.union(*parts)
    except (RuntimeError, ValueError, TypeError, RecursionError) as error:
        raise GrammarError(_reason(error)) from None


def _schema(schema: Any) -> Any:
    text = json.dumps(normalised(schema), ensure_ascii=False)
    return xgrammar.Grammar.from_json_schema(text, any_whitespace=False, strict_mode=False)


def _literal(text: str) -> Any:
    return xgrammar.Grammar.from_ebnf(f"root ::= {json.dumps(text)}")


def _reason(error: Exception) -> str:
    """The library's message without its own source line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].partition(".cc:")[2].partition(": ")[2] or str(error)[:300]


class Matcher:
    """Where one text stands in a grammar."""

    def __init__(self, compiled: Any, vocabulary_size: int) -> None:
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._words = -(-vocabulary_size // 32)

    @property
    def ended(self) -> bool:
        """An end token was taken: nothing comes after it."""
        return bool(self._matcher.is_terminated())

    def take(self, token: int) -> bool:
        """Moves on by a token; False, and no move, where it may not come."""
        return bool(self._matcher.accept_token(token))

    def back(self, count: int) -> None:
        if count:
            self._matcher.rollback(count)

    def allowed(self) -> NDArray[np.int32]:
        """int32 [ceil(vocab / 32)], bit t % 32 of word t // 32 set where token t may come."""
        mask = np.zeros((1, self._words), np.int32)
        self._matcher.fill_next_token_bitmask(mask)
        return mask[0]

    def certain_text(self) -> str:
        """What comes next in any case; as much as is whole characters."""
        return str(self._matcher.find_jump_forward_string())
