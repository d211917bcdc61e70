"""From drafts of some rows, still on the device, to the `Drafts` of a whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.drafters.base import Drafts
from engine.drafters.parts.confidence import logit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.drafters.parts.confidence import ConfidenceBins
    from engine.drafters.parts.draws import Draws


@dataclass(frozen=True, slots=True)
class Drafted:
    """Rows `rows` of a batch, each with its first `limits` of the drafts. tokens: int64 [R, D].

    confidences, peaks: float32 [R, D], chances; see `parts.confidence`. peaks: None where the confidence is that already.
    """

    rows: NDArray[np.int64]
    limits: NDArray[np.int64]
    tokens: torch.Tensor
    confidences: torch.Tensor
    peaks: torch.Tensor | None = None

    @staticmethod
    def nothing(count: int) -> Drafts:
        """No drafts for anyone."""
        return Drafts.certain([([], [])] * count)

    def spread(self, count: int, bins: ConfidenceBins, draws: Draws) -> tuple[Drafts, NDArray[np.float64]]:
        """Drafts of all `count` sequences, and the evidence for them, float64 [count, D, 2] (`parts.confidence.scaled`); one read back from
        the device.
        """
        peaks = self.confidences if self.peaks is None else self.peaks
        # Token ids are whole numbers in float32 as well: vocabularies end far below 2**24.
        packed = torch.stack((self.tokens.float(), self.confidences, peaks), -1).cpu().numpy()
        tokens, evidence = packed[..., 0].astype(np.int64), logit(packed[..., 1:].astype(np.float64))
        found = bins.bins(evidence, draws.temperatures, self.limits)
        lengths = np.zeros(count, np.int64)
        lengths[self.rows] = self.limits
        probabilities = draws.probabilities
        if probabilities is not None and len(self.rows) < count:
            full = probabilities.new_zeros(count, *probabilities.shape[1:])
            full[torch.from_numpy(self.rows).to(full.device)] = probabilities
            probabilities = full
        drafts = Drafts(self._scatter(count, tokens, 0), lengths, self._scatter(count, found, -1), probabilities)
        return drafts, self._scatter(count, evidence, 0.0)

    def _scatter(self, count: int, values: NDArray[Any], fill: float) -> NDArray[Any]:
        full = np.full((count, *values.shape[1:]), fill, values.dtype)
        full[self.rows] = values
        return full
