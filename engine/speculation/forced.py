"""What a grammar means for drafting: forced tokens are drafts that cost nothing, and drafts that it forbids are not verified.

Exactness. Forced tokens depend on confirmed text alone, and who gets them is settled before anything is drawn. A certain draft that may not
come has no chance under the target, so it is cut off: what is drawn in its place has the same distribution. A random draft may not be
cut off there, for its rejection is part of the rule (the residual is drawn from); what comes after it is never reached, and may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.drafters.builtin import TEXT_DRAFTERS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.logit_rules import Constraint
    from engine.sequence import Sequence
    from engine.speculation.proposal import Proposal

    Ints = NDArray[np.int64]

FORCED = "forced"
"""The name under which forced drafts are calibrated."""
PRIOR = np.array([0.99, 0.95, 0.6])
"""By how a forced token came about: nothing else may come; inside a certain text; its end, which often merges with what follows."""


class ForcedDrafts:
    """The forced tokens of one step. `constraints`: of every sequence, None where it has none."""

    def __init__(self, constraints: list[Constraint | None], sequences: list[Sequence], names: list[str | None], limits: Ints) -> None:
        self._constraints = constraints
        self._sequences = sequences
        self._found: dict[int, tuple[list[int], list[int]]] = {}
        for row, constraint in enumerate(constraints):
            if constraint is not None and names[row] is not None and limits[row] > 0:
                tokens, kinds = constraint.forced(sequences[row].output, int(limits[row]))
                if tokens:
                    self._found[row] = tokens, kinds

    def others(self, names: list[str | None]) -> list[str | None]:
        """Who drafts for each row: nobody that draws or costs a pass where tokens are forced."""
        return [None if row in self._found and name not in TEXT_DRAFTERS else name for row, name in enumerate(names)]

    def merge(self, proposal: Proposal) -> Ints:
        """Puts forced tokens where nothing better begins with them and cuts certain drafts where they may not go on.

        Returns the rows that got forced drafts; their survival is the caller's to fill in.
        """
        drawn = set(np.concatenate([rows for rows, _ in proposal.probabilities]).tolist()) if proposal.probabilities else set()
        taken = []
        for row, constraint in enumerate(self._constraints):
            if constraint is None or row in drawn:
                continue
            tokens, kinds = self._found.get(row, ([], []))
            drafts = proposal.token_ids[row, : proposal.drafted[row]]
            if tokens and drafts[: len(tokens)].tolist() != tokens:
                count = len(tokens)
                proposal.token_ids[row, :count], proposal.bins[row, :count], proposal.drafted[row] = tokens, kinds, count
                taken.append(row)
            elif len(drafts):
                proposal.drafted[row] = count = constraint.legal(self._sequences[row].output, drafts)
            else:
                continue
            proposal.bins[row, count:] = -1
            proposal.survival[row, count:] = 0.0
        return np.array(taken, np.int64)

    def trim(self, proposal: Proposal) -> None:
        """Of chosen random drafts, leaves out what comes after one that may not come."""
        for rows, _ in proposal.probabilities:
            for row in rows.tolist():
                constraint = self._constraints[row]
                if constraint is not None and proposal.chosen[row]:
                    legal = constraint.legal(self._sequences[row].output, proposal.tokens(row))
                    proposal.chosen[row] = min(proposal.chosen[row], legal + 1)


def without(groups: list[tuple[str, Ints]], rows: Ints) -> list[tuple[str, Ints]]:
    """`groups` less the rows whose drafts were replaced."""
    left = [(name, members[~np.isin(members, rows)]) for name, members in groups]
    return [(name, members) for name, members in left if len(members)]
