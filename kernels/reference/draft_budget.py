"""How many drafts of each request a step verifies, on the device: the fixed-capacity choice and Algorithm 1 of DSpark (arXiv 2607.05147).

The host's planner is `engine.speculation.planner`; these are for steps whose survivals never leave the device.
"""

from __future__ import annotations

import torch


def allocate_top(survival: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
    """int64 [S]: drafts of each request when the `capacity` likeliest candidates are taken; earlier positions first among equals.

    survival: float32 [S, D], falling along a row, 0 past a request's last draft. capacity: int64 [1], fixed before this step's drafts
    were drawn, or the choice would favour them.
    """
    order, alive = _order(survival)
    return _lengths(survival, order[: min(int(capacity.clamp(min=0)), alive)])


def allocate_early_stop(survival: torch.Tensor, decoding: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
    """int64 [S]: admits the next likeliest candidate while expected tokens a second grow.

    decoding: float64 [1], seconds of the step without drafts. extra: float64 [N + 1], seconds that 0..N drafts add; at most N are taken.
    """
    order, alive = _order(survival)
    taken = min(alive, len(extra) - 1)
    gained = torch.cat((extra.new_zeros(1), survival.flatten()[order[:taken]].to(extra.dtype).cumsum(0)))
    rates = (len(survival) + gained) / (decoding + extra[: taken + 1]).clamp(min=1e-12)
    falls = (rates[1:] <= rates[:-1]).nonzero()
    return _lengths(survival, order[: int(falls[0]) if len(falls) else taken])


def _order(survival: torch.Tensor) -> tuple[torch.Tensor, int]:
    flat = survival.flatten()
    return flat.sort(descending=True, stable=True).indices, int((flat > 0.0).sum())


def _lengths(survival: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    return torch.bincount(taken // max(survival.shape[1], 1), minlength=len(survival))
