"""The one error of drafter checkpoints."""

from __future__ import annotations


class DrafterError(ValueError):
    """A drafter cannot be used; the message says what is wrong with which value, and what to do."""
