"""The likeliest token of each row of logits."""

from __future__ import annotations

import torch


def peaks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest number of each row of x [T, N] and where it stands first: [T] and int64 [T]. NaN where a row has one."""
    values, places = x.max(1)
    return values, places
