"""Answers that must have a form: schemas and patterns, compiled apart, applied as masks of allowed tokens, drafted where forced."""

from engine.grammars.compiler import Compiler
from engine.grammars.constraint import GrammarConstraint
from engine.grammars.errors import GrammarError

__all__ = ["Compiler", "GrammarConstraint", "GrammarError"]
