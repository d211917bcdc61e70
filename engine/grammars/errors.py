"""What is wrong with a grammar."""


class GrammarError(ValueError):
    """A schema or pattern that cannot be followed: what it says, or that compiling it takes too long or too much. For the user's eyes."""
