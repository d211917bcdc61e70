"""Losses against the papers' formulas, and their gradients against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.training.losses import Divergences, block_losses


@pytest.mark.parametrize("likeness", [0.0, 0.99])
def test_losses_are_the_papers_once_drafts_are_accepted(likeness: float) -> None:
    """Before, the divergence weighs more, slot by slot."""
    torch.manual_seed(0)
    wanted, confidence = torch.randn(5, 3, 7) * 3.0, torch.randn(5, 3)
    logits = torch.lerp(torch.randn(5, 3, 7) * 3.0, wanted, likeness)
    valid = torch.rand(5, 3) > 0.3
    losses = block_losses(logits, confidence, wanted, valid, 4.0)
    apart = (wanted.softmax(-1) - logits.softmax(-1)).abs().sum(-1) / 2
    total = bce = weight = 0.0
    for slot in range(3):
        accepted = float((1 - apart[:, slot])[valid[:, slot]].mean())
        share = max(0.1, float(np.exp(-3.0 * accepted)))
        assert (share == 0.1) == (likeness > 0.5)
        for row in range(5):
            if valid[row, slot]:
                w = np.exp(-slot / 4.0)
                p, q = wanted[row, slot].softmax(-1), logits[row, slot].softmax(-1)
                a, c = float(apart[row, slot]), float(confidence[row, slot].sigmoid())
                total += w * (share * float((p * (p / q).log()).sum()) + (1 - share) * a)
                bce -= w * ((1 - a) * np.log(c) + a * np.log(1 - c))
                weight += w
    assert float(losses.total) == pytest.approx((total + bce) / weight, rel=1e-4)


def test_the_gradients_written_out_are_those_of_autograd() -> None:
    torch.manual_seed(1)
    wanted = torch.randn(6, 11)
    weights = torch.rand(2, 6)
    found = []
    for plain in (True, False):
        logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(2)).requires_grad_()
        if plain:
            kl = torch.nn.functional.kl_div(logits.log_softmax(-1), wanted.softmax(-1), reduction="none").sum(-1)
            tv = 0.5 * (logits.softmax(-1) - wanted.softmax(-1)).abs().sum(-1)
        else:
            kl, tv = Divergences.apply(logits, wanted)
        (weights[0] * kl + weights[1] * tv).sum().backward()
        found.append((kl.detach(), tv.detach(), logits.grad))
    for plain_one, own in zip(*found, strict=True):
        torch.testing.assert_close(own, plain_one)
