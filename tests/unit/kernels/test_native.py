"""Compiled CPU kernels against float64 definitions, and their promise: a row's result is the same to the last bit in any batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

import kernels
from kernels import native
from kernels.reference import linear as linear_reference
from kernels.reference.linear import PackedLinear, quantise
from kernels.reference.rotary_kv_write import rotary_kv_write
from tests.unit.kernels.naive import naive_attention
from tests.unit.kernels.test_attention import CASES, Case

if native.available():
    from kernels.native import attention, jit, linear, rows

pytestmark = pytest.mark.skipif(not native.available(), reason="needs llvmlite, a processor with AVX2, and torch on GNU OpenMP")

BLOCK = 16


def long_enough(case: Case) -> Case:
    """Blocks and heads of sizes that the kernels take; shared prefixes that span whole chunks."""
    lengths = [length + 170 for length in case.kv_lengths] if case.shared_blocks else case.kv_lengths
    shared = 20 if case.shared_blocks else 0
    return replace(case, block_size=BLOCK, head_dim=-(-case.head_dim // 16) * 16, kv_lengths=lengths, shared_blocks=shared)


class Cache:
    """A scattered cache with transposed keys; what was never written is not a number among values, and huge among keys."""

    def __init__(self, case: Case, seed: int = 7) -> None:
        generator = np.random.default_rng(seed)
        torch.manual_seed(seed)
        count, width = len(case.kv_lengths), -(-max(case.kv_lengths) // BLOCK)
        self.case = case
        self.tables = generator.permutation(np.arange(1, 1 + count * width)).reshape(count, width).astype(np.int32)
        self.tables[:, : case.shared_blocks] = self.tables[0, : case.shared_blocks]
        blocks = count * width + 2
        self.k = torch.full((blocks, case.kv_heads, case.head_dim, BLOCK), 1e4).transpose(2, 3)
        self.v = torch.full((blocks, case.kv_heads, BLOCK, case.head_dim), float("nan"))
        prefix = torch.randn(2, case.shared_blocks * BLOCK, case.kv_heads, case.head_dim)
        self.keys, self.values = [], []
        for table, length in zip(self.tables, case.kv_lengths, strict=True):
            pair = torch.cat((prefix, torch.randn(2, length - prefix.shape[1], case.kv_heads, case.head_dim)), dim=1)
            for position in range(length):
                at = table[position // BLOCK], slice(None), position % BLOCK
                self.k[at], self.v[at] = pair[0, position], pair[1, position]
            self.keys.append(pair[0])
            self.values.append(pair[1])
        self.q = torch.randn(sum(case.query_lengths), case.heads, case.head_dim) * 2

    def attend(self, members: list[int]) -> torch.Tensor:
        """Attention of a step with these sequences alone."""
        case = self.case
        starts = np.concatenate([[0], np.cumsum(case.query_lengths)])
        rows = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in members])
        counts = [case.query_lengths[s] for s in members]
        plan = kernels.plan_attention(
            torch.from_numpy(self.tables[members]),
            torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
            torch.tensor([case.kv_lengths[s] for s in members], dtype=torch.int32),
            torch.zeros(len(rows), dtype=torch.int64),
            cache=self.k,
            num_heads=case.heads,
            window=case.window,
        )
        return kernels.attention(self.q[torch.from_numpy(rows)], self.k, self.v, plan, case.head_dim**-0.5, case.soft_cap)


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_definition(name: str) -> None:
    case = long_enough(CASES[name])
    cache = Cache(case)
    found = cache.attend(list(range(len(case.kv_lengths))))
    expected = naive_attention(cache.q, cache.keys, cache.values, case.query_lengths, case.head_dim**-0.5, case.window, case.soft_cap)
    assert (found.double() - expected).abs().max() < 5e-6


@pytest.mark.parametrize(
    "name", ["prefill, drafts and decoding in one step", "many sequences", "shared prefix", "shared prefix, decoding", "window"]
)
def test_attention_of_a_sequence_does_not_depend_on_its_company(name: str) -> None:
    case = long_enough(CASES[name])
    cache = Cache(case)
    together = cache.attend(list(range(len(case.kv_lengths)))).split(case.query_lengths)
    for sequence, rows in enumerate(together):
        assert torch.equal(cache.attend([sequence]), rows)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 12, 13, 31, 96, 101])
@pytest.mark.parametrize(("columns", "depth"), [(48, 33), (50, 1153), (96, 576)])
def test_a_product_equals_its_definition_and_each_row_alone(rows: int, columns: int, depth: int) -> None:
    torch.manual_seed(0)
    x, weight, bias, residual = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns), torch.randn(rows, columns)
    packed = kernels.pack_linear(weight, bias)
    assert packed.layout == "panels"
    found = kernels.linear(x, packed, residual)
    assert torch.allclose(found.double(), x.double() @ weight.double().T + bias.double() + residual.double(), atol=2e-4)
    for row in (0, rows // 2, rows - 1):
        assert torch.equal(kernels.linear(x[row : row + 1], packed, residual[row : row + 1])[0], found[row])


@pytest.mark.parametrize(
    ("activation", "definition"),
    [
        ("silu", functional.silu),
        ("gelu_tanh", lambda gate: functional.gelu(gate, approximate="tanh")),
        ("relu", functional.relu),
        ("gelu", functional.gelu),
    ],
)
def test_a_gated_product_equals_its_definition(activation: str, definition) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 40), torch.randn(2 * 48, 40)
    packed = kernels.pack_gated_linear(weight, activation)
    assert (packed.layout == "gated panels") == (activation != "gelu")
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    expected = definition(gate) * up
    assert torch.allclose(kernels.gated_linear(x, packed, activation).double(), expected, atol=1e-5 * float(expected.abs().max()))


def test_activations_far_from_zero_stay_finite() -> None:
    weight = torch.cat((torch.full((16, 1), -1.0), torch.ones(16, 1)))
    packed = kernels.pack_gated_linear(weight, "silu")
    found = kernels.gated_linear(torch.tensor([[1e4], [-1e4]]), packed, "silu")
    assert found[0].abs().max() < 1e-25
    assert torch.allclose(found[1], torch.full((16,), -1e8))


@pytest.mark.parametrize("rotated", [0, 32, 64])
@pytest.mark.parametrize("normed", [False, True])
def test_keys_and_values_are_written_as_the_reference_does(rotated: int, normed: bool) -> None:
    torch.manual_seed(0)
    rows, heads, kv_heads, dim = 9, 4, 2, 64
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim)
    angles = torch.randn(rows, rotated // 2)
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    turn = (cos, sin) if rotated else (None, None)
    norms = {"q_norm": torch.rand(dim), "k_norm": torch.rand(dim), "eps": 1e-6} if normed else {}
    slots = torch.tensor([16, 17, 40, -1, 63, 5, 31, 47, 20])
    plain = (torch.zeros(4, kv_heads, BLOCK, dim), torch.zeros(4, kv_heads, BLOCK, dim))
    expected = rotary_kv_write(qkv.clone(), *turn, slots, *plain, num_heads=heads, **norms)
    k = torch.zeros(4, kv_heads, dim, BLOCK).transpose(2, 3)
    v = torch.zeros_like(plain[1])
    found = kernels.rotary_kv_write(qkv.clone(), *turn, slots, k, v, num_heads=heads, **norms)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(k, plain[0], atol=1e-6)
    assert torch.equal(v, plain[1])


def test_processors_with_other_vectors_run_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of 16 numbers (or of 8, where the machine has 16), which LLVM puts together from what there is."""
    other = 24 - jit.lanes()
    made = (linear._kernel, attention._kernel, rows._norm_kernel, rows._rotate_kernel, rows._peaks_kernel)
    monkeypatch.setattr(jit, "lanes", lambda: other)
    monkeypatch.setattr(linear, "lanes", lambda: other)
    for cached in made:
        cached.cache_clear()
    try:
        test_a_product_equals_its_definition_and_each_row_alone(7, 50, 33)
        test_a_gated_product_equals_its_definition("silu", functional.silu)
        test_attention_equals_the_definition("prefill, drafts and decoding in one step")
        test_keys_and_values_are_written_as_the_reference_does(32, normed=True)
        test_peaks_are_the_first_of_the_highest(3, 33)
    finally:
        for cached in made:
            cached.cache_clear()


def test_without_compiled_kernels_the_same_products_come_from_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64), torch.randn(64, 64)
    compiled = kernels.linear(x, kernels.pack_linear(weight)), kernels.gated_linear(x, kernels.pack_gated_linear(weight, "silu"), "silu")
    monkeypatch.setattr(native, "available", lambda: False)
    packed, gated = kernels.pack_linear(weight), kernels.pack_gated_linear(weight, "silu")
    assert "panels" not in packed.layout
    assert "panels" not in gated.layout
    assert torch.allclose(kernels.linear(x, packed), compiled[0], atol=1e-4)
    assert torch.allclose(kernels.gated_linear(x, gated, "silu"), compiled[1], atol=1e-3)
    assert not native.takes_cache(torch.float32, torch.device("cpu"), 64, 16)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 13, 101])
@pytest.mark.parametrize(("columns", "depth"), [(48, 33), (50, 1153)])
def test_a_product_with_int8_weights_equals_its_definition_and_each_row_alone(rows: int, columns: int, depth: int) -> None:
    torch.manual_seed(0)
    x, weight, bias, residual = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns), torch.randn(rows, columns)
    packed = kernels.pack_linear(weight, bias, int8=True)
    assert packed.layout == "panels"
    assert packed.weight.dtype == torch.int8
    numbers, scales = quantise(weight)
    assert (numbers * scales[:, None] - weight).abs().max() <= weight.abs().max() / 254 * 1.001
    found = kernels.linear(x, packed, residual)
    rounded = numbers.double() * scales.double()[:, None]
    assert torch.allclose(found.double(), x.double() @ rounded.T + bias.double() + residual.double(), atol=3e-4)
    for row in (0, rows // 2, rows - 1):
        assert torch.equal(kernels.linear(x[row : row + 1], packed, residual[row : row + 1])[0], found[row])


def test_numbers_in_eight_bits_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 20)
    weight[5] = 0.0
    whole = quantise(weight)
    monkeypatch.setattr(linear_reference, "_AT_ONCE", 3 * 20)
    assert all(torch.equal(one, other) for one, other in zip(whole, quantise(weight), strict=True))
    largest = weight.abs().amax(1)
    assert torch.equal(whole[0].abs().amax(1) == 127, largest > 0)
    assert torch.allclose(whole[1] * 127, largest)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("stored", "dtype"), [(torch.float32, None), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_weight_in_pieces_is_packed_as_their_stack(
    stored: torch.dtype, dtype: torch.dtype | None, int8: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_reference, "_AT_ONCE", 7 * 20)
    if not compiled:
        monkeypatch.setattr(native, "available", lambda: False)
    torch.manual_seed(0)
    kind = dtype or stored
    weight, bias = torch.randn(131, 20).to(stored), torch.randn(131).to(kind)
    pieces = weight.split([5, 64, 1, 0, 29, 32])
    assert_same(kernels.pack_linear(pieces, bias, int8=int8, dtype=dtype), kernels.pack_linear(weight.to(kind), bias, int8=int8))
    gate, up = weight[:128].chunk(2)
    packed = kernels.pack_gated_linear([gate, up], "silu", int8=int8, dtype=dtype)
    assert_same(packed, kernels.pack_gated_linear(weight[:128].to(kind), "silu", int8=int8))
    before = plain(packed.weight).clone()
    weight.zero_()
    assert torch.equal(plain(packed.weight), before), "the result owns its memory"


def assert_same(one: PackedLinear, other: PackedLinear) -> None:
    assert (one.layout, one.out_features) == (other.layout, other.out_features)
    for mine, theirs in ((one.weight, other.weight), (one.bias, other.bias), (one.scales, other.scales)):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(plain(mine), plain(theirs))


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_dense() if tensor.is_mkldnn else tensor


def test_a_gated_product_with_int8_weights_equals_the_reference() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 40), torch.randn(2 * 48, 40)
    packed = kernels.pack_gated_linear(weight, "silu", int8=True)
    assert packed.layout == "gated panels"
    numbers, scales = quantise(weight)
    gate, up = (x.double() @ (numbers.double() * scales.double()[:, None]).T).chunk(2, dim=-1)
    assert torch.allclose(kernels.gated_linear(x, packed, "silu").double(), functional.silu(gate) * up, atol=1e-3)
    plain = PackedLinear(numbers, None, len(weight), "rows", scales)  # what other processors and types run
    assert torch.allclose(kernels.gated_linear(x, plain, "silu").double(), functional.silu(gate) * up, atol=1e-3)


@pytest.mark.parametrize("columns", [1, 5, 16, 33, 1000])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_peaks_are_the_first_of_the_highest(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    for spread in (2, 10_000):  # many equal numbers, and hardly any
        wide = torch.randint(-spread, spread, (rows, columns + 3), generator=generator).float()
        x = wide[:, :columns]
        values, places = kernels.peaks(x)
        assert torch.equal(values, x.amax(1))
        assert places.tolist() == [row.index(max(row)) for row in x.tolist()]
    x[:, -1] = float("-inf")
    x[0] = float("-inf")
    values, places = kernels.peaks(x)
    assert (values[0], places[0]) == (float("-inf"), 0)
    for wrong in (0, columns // 2, columns - 1):
        for number in (float("nan"), float("inf")):
            bad = torch.randn(rows, columns, generator=generator)
            bad[rows - 1, wrong] = number
            values, places = kernels.peaks(bad)
            assert values.isfinite().tolist() == [True] * (rows - 1) + [False]
            assert (places < columns).all()
