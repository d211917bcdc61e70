"""Peaks of a product found without all of it: those of the whole product to the last bit, whatever the numbers are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import native
from kernels.reference.linear import PackedLinear
from tests.unit.kernels.test_sequential_head import compare_likeliest

if native.available():
    from kernels.native import jit, linear, rows, screen
    from kernels.native import sequential_head as drafting

pytestmark = pytest.mark.skipif(not native.available(), reason="needs llvmlite, a processor with AVX2, and torch on GNU OpenMP")

KINDS = ("even", "outliers", "alike", "below zero", "copies", "tiny", "huge", "integers")


def weight_of(kind: str, columns: int, depth: int) -> torch.Tensor:
    weight = torch.randn(columns, depth)
    if kind == "outliers":
        weight[::3, 1] *= 200
    elif kind == "alike":  # further apart than float32 can tell, closer than eight bits can
        weight = weight[:1] + 1e-4 * weight
    elif kind == "copies":
        weight = weight[torch.arange(columns) % 7]
    elif kind == "tiny":
        weight = weight * 1e-25
        weight[columns // 2] = 0.0
    elif kind == "huge":
        weight = weight * 1e12
    elif kind == "integers":
        weight = weight.round()
    return weight


def inputs_of(kind: str, count: int, weight: torch.Tensor) -> torch.Tensor:
    x = torch.randn(count, weight.shape[1])
    if kind == "outliers":
        x[:, ::5] *= 50
    elif kind == "below zero":  # every output is negative: what pads the last panel must not win
        x = -weight.mean(0) * 0 - weight.abs().sum(0) * torch.rand(count, 1)
    elif kind == "tiny":
        x = x * 1e-10
    elif kind == "integers":
        x = x.round()
    x[count // 2] = 0.0
    return x


def check(packed: PackedLinear, x: torch.Tensor) -> None:
    values, places = kernels.linear_peaks(x, packed)
    wanted = kernels.peaks(kernels.linear(x, packed))
    assert torch.equal(values, wanted[0])
    assert torch.equal(places, wanted[1])


@pytest.mark.parametrize("count", [1, 2, 5, 7, 13, 101, 200])
@pytest.mark.parametrize(("columns", "depth"), [(48, 32), (50, 64), (1, 32), (999, 576), (300, 2080)])
@pytest.mark.parametrize("kind", KINDS)
def test_screened_peaks_are_those_of_the_whole_product(kind: str, columns: int, depth: int, count: int) -> None:
    torch.manual_seed(0)
    weight = weight_of(kind, columns, depth)
    if kind == "below zero":
        weight = weight.abs()
    packed = kernels.pack_linear(weight, screened=True)
    assert packed.screen is not None
    check(packed, inputs_of(kind, count, weight))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(KINDS), st.integers(1, 90), st.integers(1, 4), st.integers(1, 20))
def test_screened_peaks_are_exact_for_any_numbers(seed: int, kind: str, columns: int, depth: int, count: int) -> None:
    torch.manual_seed(seed)
    weight = weight_of(kind, columns, 32 * depth)
    check(kernels.pack_linear(weight, screened=True), inputs_of(kind, count, weight))


def test_rows_may_lie_apart_and_be_none() -> None:
    torch.manual_seed(0)
    packed = kernels.pack_linear(torch.randn(70, 64), screened=True)
    check(packed, torch.randn(9, 160)[:, 32:96])
    check(packed, torch.randn(0, 64))


def test_a_row_that_is_no_number_has_no_peak_and_no_neighbour_minds() -> None:
    torch.manual_seed(0)
    packed = kernels.pack_linear(torch.randn(70, 64), screened=True)
    for number in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(9, 64)
        whole = kernels.linear_peaks(x, packed)
        x[4, 17] = number
        values, places = kernels.linear_peaks(x, packed)
        others = torch.arange(9) != 4
        assert values.isfinite().tolist() == others.tolist()
        assert torch.equal(values[others], whole[0][others])
        assert torch.equal(places[others], whole[1][others])
        assert 0 <= places[4] < 70


def test_bounds_cover_what_rounding_takes_and_hardly_more() -> None:
    """|w x - s t (q y)| <= b |x| in float64, with both roundings at their worst; for random numbers b is a hundredth of a row's length."""
    torch.manual_seed(0)
    weight = torch.randn(64, 576)
    packed = kernels.pack_linear(weight, screened=True)
    made = packed.screen
    assert made is not None
    numbers = made.numbers.permute(0, 2, 1, 3).reshape(-1, 576)[:64].double()
    rounded = numbers * made.scales[:64, None].double()
    bounds = made.bounds[:64].double()
    off = weight.double() - rounded
    steps = screen._input_steps(576)
    assert 127 * 576 * steps < 1 << 31
    for row in range(64):
        # The input that makes the most of this row's rounding, and one that is rounded by half a step everywhere.
        for x in (off[row], rounded[row].sign() * (torch.arange(576) % 2 + 0.5) / steps + torch.eye(576, dtype=torch.float64)[0]):
            t = x.abs().max() / steps
            y = (x / t).round()
            error = (weight[row].double() @ x - t * (rounded[row] @ y)).abs()
            assert error <= bounds[row] * x.norm()
    assert (bounds / weight.norm(dim=1) < 0.02).all()


def test_without_its_bounds_a_screen_gives_wrong_answers() -> None:
    """What the tests above would miss if the kernel looked at the most promising panel alone."""
    torch.manual_seed(0)
    weight = weight_of("alike", 999, 576)
    packed = kernels.pack_linear(weight, screened=True)
    made = packed.screen
    assert made is not None
    trusting = replace(packed, screen=replace(made, bounds=torch.zeros_like(made.bounds)))
    x = torch.randn(50, 576)
    assert not torch.equal(kernels.linear_peaks(x, trusting)[1], kernels.peaks(kernels.linear(x, packed))[1])


def test_most_panels_of_a_spread_out_product_are_ruled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by poisoning: panels that cannot hold the peak may be anything by the time they would be read."""
    torch.manual_seed(0)
    weight = torch.randn(4000, 576)
    packed = kernels.pack_linear(weight, screened=True)
    x = torch.randn(5, 576)
    x += 3.0 * weight[[7, 900, 1800, 2700, 3999]] / 24
    wanted = kernels.peaks(kernels.linear(x, packed))
    near = wanted[1] // linear.panel_width()
    far = torch.ones(len(packed.weight), dtype=torch.bool)
    outputs = kernels.linear(x, packed)
    for row in range(5):
        close = (outputs[row] > wanted[0][row] * 0.85).nonzero()[:, 0] // linear.panel_width()
        far[close] = False
    assert not far[near].any()
    assert far.float().mean() > 0.9
    packed.weight[far] = float("inf")
    values, places = kernels.linear_peaks(x, packed)
    assert torch.equal(values, wanted[0])
    assert torch.equal(places, wanted[1])


@pytest.mark.parametrize("count", [1, 7, 101])
def test_a_rough_product_is_off_by_no_more_than_its_bounds(count: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(50, 576), torch.randn(count, 576)
    packed = kernels.pack_linear(weight, screened=True)
    made = packed.screen
    assert made is not None
    off = (kernels.rough_linear(x, packed).double() - x.double() @ weight.double().T).abs()
    assert (off <= made.bounds[:50] * x.norm(dim=1, keepdim=True)).all()
    assert off.max() > 1e-3, "eight bits are seen"
    plain = kernels.pack_linear(weight)
    assert torch.equal(kernels.rough_linear(x, plain), kernels.linear(x, plain))
    assert kernels.rough_linear(x[:0], packed).shape == (0, 50)


def test_what_cannot_be_screened_is_computed_whole() -> None:
    torch.manual_seed(0)
    bad = torch.randn(48, 64)
    bad[5, 5] = float("nan")
    cases = {
        "vectors that are not whole": kernels.pack_linear(torch.randn(48, 33), screened=True),
        "too deep": kernels.pack_linear(torch.randn(16, screen.MOST_DEPTH + 32), screened=True),
        "a bias": kernels.pack_linear(torch.randn(48, 64), torch.randn(48), screened=True),
        "eight bits already": kernels.pack_linear(torch.randn(48, 64), int8=True, screened=True),
        "no number": kernels.pack_linear(bad, screened=True),
        "not asked for": kernels.pack_linear(torch.randn(48, 64)),
    }
    for name, packed in cases.items():
        assert packed.screen is None, name
        depth = packed.weight.shape[1]
        values, places = kernels.linear_peaks(torch.randn(3, depth), packed)
        assert values.shape == places.shape == (3,)


def test_processors_with_other_vectors_screen_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    other = 24 - jit.lanes()
    made = (
        screen._round_kernel, screen._screen_kernel, screen._decide_kernel, screen._pack_kernel, linear._kernel, rows._peaks_kernel,
        rows._sums_kernel,
    )  # fmt: skip
    for module in (jit, linear, screen, drafting):
        monkeypatch.setattr(module, "lanes", lambda: other)
    for cached in made:
        cached.cache_clear()
    try:
        for kind in KINDS:
            test_screened_peaks_are_those_of_the_whole_product(kind, 999 if kind != "below zero" else 50, 96 + 32 * (kind == "even"), 13)
        test_a_row_that_is_no_number_has_no_peak_and_no_neighbour_minds()
        compare_likeliest("vanilla", True, 7)
    finally:
        for cached in made:
            cached.cache_clear()
