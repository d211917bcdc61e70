"""Runs the Triton ops against their references: through the interpreter on a CPU (as a program of its own, since the interpreter is chosen
when triton is imported), on a GPU from tests/gpu.
"""

from __future__ import annotations

import os
import sys

SHAPES = [(1, 1), (3, 7), (17, 64), (5, 576), (2, 1000)]
TOLERANCE = 2e-6


def check(device: str) -> int:
    """Compares every op on every shape with fresh random inputs in float64. Returns the number of cases; raises AssertionError."""
    import torch

    from kernels.reference.gated_activation import ACTIVATIONS
    from kernels.triton.gated_activation import gated_activation
    from kernels.triton.rms_norm import rms_norm

    cases = 0
    for rows, columns in SHAPES:
        x = torch.randn(rows, columns, device=device)
        weight = torch.randn(columns, device=device)
        exact = torch.rms_norm(x.double(), (columns,), weight.double(), 1e-5)
        torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), exact, rtol=TOLERANCE, atol=TOLERANCE)
        cases += 1
        gate_up = 3 * torch.randn(rows, 2 * columns, device=device)
        gate, up = gate_up.double().chunk(2, dim=-1)
        for name, activation in ACTIVATIONS.items():
            exact = activation(gate) * up
            torch.testing.assert_close(gated_activation(gate_up, name).double(), exact, rtol=TOLERANCE, atol=4 * TOLERANCE)
            cases += 1
    for refused in (
        lambda: rms_norm(torch.ones(2, 4, device=device), torch.ones(3, device=device), 1e-5),
        lambda: gated_activation(torch.ones(1, 3), "silu"),
    ):
        try:
            refused()
        except ValueError:
            cases += 1
        else:
            raise AssertionError("a wrong shape was taken")
    return cases


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.stdout.write(f"{check('cpu')} cases\n")
