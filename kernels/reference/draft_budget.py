"""How many drafts of each request a step verifies, on the device (DSpark, arXiv 2607.05147, in its fixed-capacity form).

The host's planner is `engine.speculation.planner`; this is for steps whose survivals never leave the device. A captured step computes all
rows of its shape, so only a choice that fills a fixed number of rows saves anything there: Algorithm 1's early stop belongs to the host.
"""

from __future__ import annotations

import torch


def allocate_top(survival: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
    """int64 [S]: drafts of each request when the `capacity` likeliest candidates are taken; earlier positions first among equals.

    survival: float32 [S, D], falling along a row, 0 past a request's last draft. capacity: int64 [1], fixed before this step's drafts
    were drawn, or the choice would favour them.
    """
    flat = survival.flatten()
    order = flat.sort(descending=True, stable=True).indices
    taken = order[: min(int(capacity.clamp(min=0)), int((flat > 0.0).sum()))]
    return torch.bincount(taken // max(survival.shape[1], 1), minlength=len(survival))
