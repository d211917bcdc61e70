"""Norm, rotation, activation and product against float64 definitions."""

from __future__ import annotations

import pytest
import torch

import kernels


@pytest.mark.parametrize("shape", [(1, 7), (5, 576), (3, 4, 64), (0, 16)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    wide = x.double()
    expected = wide / torch.sqrt((wide**2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    found = kernels.rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_heads_within_a_fused_row_are_normalised_alone() -> None:
    torch.manual_seed(0)
    fused, weight = torch.randn(5, 6 * 64), torch.randn(64)
    heads = fused.view(5, 6, 64)[:, 1:4]
    before = fused.clone()
    found = kernels.rms_norm(heads, weight, 1e-5)
    wide = heads.double()
    expected = wide / torch.sqrt((wide**2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert found.shape == heads.shape
    assert torch.allclose(found.double(), expected, atol=2e-6, rtol=2e-6)
    assert torch.equal(fused, before)


@pytest.mark.parametrize("rotated", [8, 4])
def test_rotary_turns_pairs_and_leaves_the_rest(rotated: int) -> None:
    torch.manual_seed(0)
    fused = torch.randn(5, 3 * 8)
    x = fused.view(5, 3, 8)[:, :2]  # strided, as a slice of a fused product is
    angles = torch.randn(5, rotated // 2)
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    found = kernels.rotary(x, cos, sin)
    first, second = x[..., : rotated // 2].double(), x[..., rotated // 2 : rotated].double()
    turned = torch.complex(first, second) * torch.polar(torch.ones(5, rotated // 2).double(), angles.double())[:, None]
    expected = torch.cat((turned.real, turned.imag, x[..., rotated:].double()), -1)
    assert torch.allclose(found.double(), expected, atol=1e-6)
    assert torch.equal(fused, fused.clone())


@pytest.mark.parametrize(
    ("name", "definition"),
    [
        ("silu", lambda g: g / (1 + torch.exp(-g))),
        ("gelu", lambda g: g * 0.5 * (1 + torch.erf(g / 2**0.5))),
        ("gelu_tanh", lambda g: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)))),
        ("relu", lambda g: g.clamp_min(0)),
    ],
)
def test_gated_activation(name: str, definition: object) -> None:
    torch.manual_seed(0)
    fused = torch.randn(5, 22)
    gate, up = fused.double().chunk(2, -1)
    assert torch.allclose(kernels.gated_activation(fused, name).double(), definition(gate) * up, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 3, 64])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3), (torch.float16, 5e-2)])
def test_linear(rows: int, with_bias: bool, with_residual: bool, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(70, 33).to(dtype), torch.randn(70).to(dtype)
    x, residual = torch.randn(rows, 33).to(dtype), torch.randn(rows, 70).to(dtype)
    kept = residual.clone()
    packed = kernels.pack_linear(weight, bias if with_bias else None)
    found = kernels.linear(x, packed, residual if with_residual else None)
    expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0) + (residual.double() if with_residual else 0)
    assert found.shape == (rows, 70)
    assert torch.allclose(found.double(), expected, atol=tolerance)
    assert torch.equal(residual, kept), "a residual belongs to the caller"
