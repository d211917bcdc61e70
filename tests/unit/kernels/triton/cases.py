"""Every Triton op on shapes ordinary and odd: `cases(full=False)` for the interpreter, `full=True` for a device.

`python -m tests.unit.kernels.triton.cases` runs them in the interpreter (a process of its own: the choice is made when triton is
imported) and prints how many there were of each op.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from kernels.testing import TOLERANCES, Case, paged_inputs, poisoned_allocations

Results = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]
HALF_TYPES = (torch.float16, torch.bfloat16)


def cases(*, full: bool) -> Iterator[Case]:
    yield from _attention_cases(full=full)
    yield from _kv_cases(full=full)
    yield from _row_cases(full=full)
    yield from _vocabulary_cases(full=full)
    yield from _head_cases(full=full)
    yield from _fp8_cases(full=full)
    for size, drafts in ((1, 4), (5, 7), (13, 3), *(((256, 16), (1, 64)) if full else ())):
        yield Case("allocate_top", f"{size}x{drafts}", partial(_allocate_top, size, drafts))


def _double(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.double() if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float8_e4m3fn else tensor


# --- attention and the cache --------------------------------------------------------------------------------------------------

MIXED = {"queries": (1, 5, 17, 129), "contexts": (40, 5, 61, 140)}
FEW = {"queries": (1, 5, 3), "contexts": (95, 33, 120)}


def _attention_cases(*, full: bool) -> Iterator[Case]:
    def case(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
        shapes = {"heads": 6, "kv_heads": 2, "dim": 16, "block_size": 16} | options
        tolerance = TOLERANCES[dtype]
        return Case("attention", f"{name}, {str(dtype)[6:]}", partial(_attention, dtype=dtype, **shapes), tolerance)

    yield case("q 1/5/17/129, 3 heads over 1", **MIXED)
    yield case("pages of 4, head of 24", dim=24, block_size=4, **FEW)
    yield case("pages of 64, 1 head over 1", heads=2, dim=32, block_size=64, **FEW)
    yield case("7 heads over 1", heads=14, **FEW)
    yield case("split keys", processors=64, queries=(1, 1), contexts=(600, 33))
    yield case("shared prefix", shared_blocks=9, block_size=4, queries=(1, 5, 3), contexts=(95, 50, 70))
    yield case("shared prefix, split keys", shared_blocks=140, processors=96, block_size=4, queries=(1, 2), contexts=(601, 570))
    yield case("window", window=20, **FEW)
    yield case("soft cap", soft_cap=2.0, **FEW)
    yield case("draft blocks without a mask", causal=False, queries=(7, 7), contexts=(47, 90))
    yield case("draft blocks without a mask, window", causal=False, window=30, queries=(7, 4), contexts=(47, 90))
    yield case("a sequence without rows", queries=(3, 0, 2), contexts=(40, 20, 9))
    yield case("fp8 cache", fp8=True, **FEW)
    yield case("values that lie otherwise than keys, far away", apart=True, **FEW)
    for dtype in HALF_TYPES:
        yield case("mixed", dtype, **FEW)
    yield case("fp8 cache", torch.bfloat16, fp8=True, **FEW)
    if not full:
        return
    large = {"queries": (1, 5, 17, 129, 1, 8, 700), "contexts": (4000, 300, 61, 140, 9000, 8192, 700)}
    for dtype in (torch.float32, *HALF_TYPES):
        for heads, kv_heads, dim in ((32, 8, 128), (9, 3, 64), (16, 16, 96), (8, 1, 256), (6, 2, 80)):
            for block_size in (16, 32, 128):
                if dim <= 128 or dtype != torch.float32:
                    shapes = dict(heads=heads, kv_heads=kv_heads, dim=dim, block_size=block_size, **large)
                    yield case(f"{heads}/{kv_heads}x{dim} pages {block_size}", dtype, **shapes)
    for options in ({"window": 1024}, {"soft_cap": 30.0}, {"causal": False}, {"fp8": True}, {"fp8": True, "window": 99, "soft_cap": 20.0}):
        for dtype in HALF_TYPES:
            yield case(f"{options}", dtype, heads=32, kv_heads=8, dim=128, block_size=16, **large, **options)
    decode = {"queries": (1,) * 40, "contexts": tuple(range(2100, 2140))}
    yield case("40 siblings", torch.bfloat16, heads=32, kv_heads=8, dim=128, block_size=16, shared_blocks=128, **decode)


def _attention(device: torch.device, *, dtype: torch.dtype, **options: Any) -> Results:
    from kernels.reference.paged_attention import paged_attention
    from kernels.triton.attention import attention
    from kernels.triton.attention_plan import plan_attention

    step = {name: options.pop(name) for name in ("window", "soft_cap", "causal", "processors") if name in options}
    queries, contexts, apart = options.pop("queries"), options.pop("contexts"), options.pop("apart", False)
    inputs = paged_inputs(queries, contexts, dtype=dtype, device=device, **options)
    processors = step.pop("processors", None if device.type == "cuda" else 1)
    slots = torch.zeros(len(inputs.q), dtype=torch.int64, device=device)
    place = (inputs.tables, inputs.query_start, inputs.kv_lengths)
    soft_cap = step.pop("soft_cap", None)
    plan = plan_attention(*place, slots, cache=inputs.k_cache, num_heads=inputs.q.shape[1], processors=processors, **step)
    if processors and processors > 8:
        assert plan.splits > 1, "this case is there for keys that are split"
    scale = inputs.q.shape[2] ** -0.5
    scales = {"k_scale": inputs.k_scale, "v_scale": inputs.v_scale}
    exact = paged_attention(
        inputs.q.double(), _double(inputs.k_cache), _double(inputs.v_cache), *place, scale, soft_cap=soft_cap, **step, **scales
    )
    values = inputs.v_cache.transpose(1, 2).contiguous().transpose(1, 2) if apart else inputs.v_cache
    near = mock.patch("kernels.triton.attention._NEAR", 0) if apart else contextlib.nullcontext()
    with poisoned_allocations(), near:
        made = attention(inputs.q, inputs.k_cache, values, plan, scale, soft_cap, **scales)
    return (made,), (exact,)


def _kv_cases(*, full: bool) -> Iterator[Case]:
    shapes = [(6, 2, 16, 16, 4), (3, 1, 24, 12, 16), (0, 2, 16, 16, 4), (4, 2, 16, 0, 4), (2, 1, 9, 4, 4)]
    if full:
        shapes += [(32, 8, 128, 128, 16), (9, 3, 64, 64, 32), (16, 1, 256, 256, 16), (32, 32, 96, 24, 16)]
    for heads, kv_heads, dim, rotated, page in shapes:
        for dtype in (torch.float32, *HALF_TYPES) if full or dim == 24 else (torch.float32,):
            run = partial(_rotary_kv_write, heads, kv_heads, dim, rotated, page, dtype, fp8=False)
            yield Case("rotary_kv_write", f"{heads}/{kv_heads}x{dim} rotated {rotated}, {str(dtype)[6:]}", run, TOLERANCES[dtype])
    run = partial(_rotary_kv_write, 6, 2, 16, 16, 4, torch.float32, fp8=True)
    yield Case("rotary_kv_write", "fp8 cache", run, 0.01)
    for dtype in (torch.float32, *HALF_TYPES):
        yield Case("kv_write", str(dtype)[6:], partial(_kv_write, dtype))


def _rotary_kv_write(
    heads: int, kv_heads: int, dim: int, rotated: int, page: int, dtype: torch.dtype, device: torch.device, *, fp8: bool
) -> Results:
    from kernels.reference.rotary_kv_write import rotary_kv_write as reference
    from kernels.triton.kv_write import rotary_kv_write

    rows, blocks = 7, 5
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, device=device).to(dtype)
    angle = torch.randn(rows, rotated // 2, device=device)
    cos, sin = torch.cat((angle.cos(),) * 2, 1).to(dtype), torch.cat((-angle.sin(), angle.sin()), 1).to(dtype)
    slots = torch.randperm(blocks * page, device=device)[:rows]
    slots[2] = -1
    cache = torch.full((blocks, kv_heads, page, dim), 7.0, device=device)
    k_cache, v_cache = (cache.to(torch.float8_e4m3fn if fp8 else dtype).clone() for _ in range(2))
    k_exact, v_exact = (cache.to(torch.float8_e4m3fn if fp8 else torch.float64).clone() for _ in range(2))
    scales = [torch.rand(kv_heads, device=device) + 0.5 for _ in range(2)] if fp8 else [None, None]
    norms = [torch.randn(dim, device=device).to(dtype) if count else None for count in (heads, kv_heads)]
    options = {"num_heads": heads, "eps": 1e-5, "k_scale": scales[0], "v_scale": scales[1]}
    turn = (cos, sin) if rotated else (None, None)
    exact = reference(
        qkv.double(), *(_double(t) for t in turn), slots, k_exact, v_exact, q_norm=_double(norms[0]), k_norm=_double(norms[1]), **options
    )
    with poisoned_allocations():
        made = rotary_kv_write(qkv, *turn, slots, k_cache, v_cache, q_norm=norms[0], k_norm=norms[1], **options)
    made_all, exact_all = (made, k_cache.double(), v_cache.double()), (exact, k_exact.double(), v_exact.double())
    return (made_all, exact_all) if heads else (made_all[1:], exact_all[1:])


def _kv_write(dtype: torch.dtype, device: torch.device) -> Results:
    from kernels.triton.attention_plan import plan_attention
    from kernels.triton.kv_write import kv_write

    fused = torch.randn(6, 5 * 8, device=device).to(dtype).view(6, 5, 8)
    k, v = fused[:, 1:3], fused[:, 3:]
    caches = [torch.full((4, 2, 4, 8), 7.0, device=device, dtype=dtype) for _ in range(2)]
    slots = torch.tensor([15, 0, 3, 6, -1, 9], device=device)
    bounds, lengths = torch.tensor([0, 6], dtype=torch.int32, device=device), torch.tensor([6], dtype=torch.int32, device=device)
    tables = torch.zeros(1, 2, dtype=torch.int32, device=device)
    plan = plan_attention(tables, bounds, lengths, slots, cache=caches[0], num_heads=2, processors=1)
    exact = [cache.clone() for cache in caches]
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            exact[0][slot // 4, :, slot % 4], exact[1][slot // 4, :, slot % 4] = k[row], v[row]
    kv_write(k, v, *caches, plan)
    return caches, exact


# --- rows ---------------------------------------------------------------------------------------------------------------------


def _row_cases(*, full: bool) -> Iterator[Case]:
    shapes = [(1, 1), (3, 7), (5, 576), (2, 1000), *(((4096, 4096), (33, 12288), (7, 65536)) if full else ())]
    for rows, columns in shapes:
        for dtype in (torch.float32, *HALF_TYPES) if full or columns == 7 else (torch.float32,):
            name = f"{rows}x{columns}, {str(dtype)[6:]}"
            yield Case("rms_norm", name, partial(_rms_norm, rows, columns, dtype), TOLERANCES[dtype])
            yield Case("add_rms_norm", name, partial(_add_rms_norm, rows, columns, dtype), TOLERANCES[dtype])
            if not full and columns == 7:  # rows that share a program, as they do where there are many
                yield Case("rms_norm", f"many rows, {name}", partial(_rms_norm, 1030, 24, dtype), TOLERANCES[dtype])
                yield Case("add_rms_norm", f"many rows, {name}", partial(_add_rms_norm, 1024, 32, dtype), TOLERANCES[dtype])
            for activation in ("silu", "gelu", "gelu_tanh", "relu") if columns <= 12288 else ():
                run = partial(_gated_activation, rows, columns, dtype, activation)
                # 1 + erf(gate) cancels where the gate is far below zero: the error is that of numbers of order 1, however small the result
                yield Case("gated_activation", f"{activation} {name}", run, TOLERANCES[dtype], least=1.0)


def _rms_norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Results:
    from kernels.triton.rms_norm import rms_norm

    x, weight = torch.randn(rows, columns + 3, device=device).to(dtype)[:, 3:], torch.randn(columns, device=device).to(dtype)
    with poisoned_allocations():
        made = rms_norm(x, weight, 1e-5)
    return (made,), (torch.rms_norm(x.double(), (columns,), weight.double(), 1e-5),)


def _add_rms_norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Results:
    from kernels.triton.rms_norm import add_rms_norm

    x, residual = (torch.randn(rows, columns, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(columns, device=device).to(dtype)
    with poisoned_allocations():
        made = add_rms_norm(x, residual, weight, 1e-5)
    total = x.double() + residual.double()
    return made, (torch.rms_norm(total, (columns,), weight.double(), 1e-5), total)


def _gated_activation(rows: int, columns: int, dtype: torch.dtype, activation: str, device: torch.device) -> Results:
    from kernels.reference.gated_activation import ACTIVATIONS
    from kernels.triton.gated_activation import gated_activation

    gate_up = 3 * torch.randn(rows, 2 * columns, device=device).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    with poisoned_allocations():
        made = gated_activation(gate_up, activation)
    return (made,), (ACTIVATIONS[activation](gate) * up,)


# --- the vocabulary -----------------------------------------------------------------------------------------------------------


def _vocabulary_cases(*, full: bool) -> Iterator[Case]:
    sizes = ((9, 1300), (64, 151_936), (5, 262_144)) if full else ((9, 1300),)
    for rows, vocab in sizes:
        for kind in ("no drafts", "certain drafts", "drawn drafts", "biases", "penalties", "allowed tokens", "everything"):
            for dtype in (torch.float32, torch.bfloat16) if full else (torch.float32,):
                yield Case("verify", f"{kind}, {rows}x{vocab}, {str(dtype)[6:]}", partial(_verify, rows, vocab, kind, dtype))
        yield Case("token_log_probs", f"{rows}x{vocab}", partial(_log_probs, rows, vocab, 3 if not full else 20), 1e-5)
    # A threshold among few numbers, among more than there is room for, and among numbers that are all alike.
    for room in (8, 64):
        yield Case("verify", f"flat rows, cut with room for {room}", partial(_cut, room))
    yield Case("verify", "rows that are not finite", _not_finite)
    yield Case("verify", "the noise of all rows is the reference's", _same_noise)
    yield Case("accept_drafts", "5 sequences", partial(_accept, tallied=False))
    yield Case("accept_drafts", "5 sequences, counted", partial(_accept, tallied=True))


def sample_rows(rows: int, vocab: int, device: torch.device, *, drafts: bool) -> Any:
    """Rows of every mode and every kind of cut, in turn."""
    from kernels.reference.sampling import SampleRows

    index = torch.arange(rows, device=device)
    return SampleRows(
        (index % 3).to(torch.int32),
        torch.rand(rows, device=device) + 0.3,
        torch.tensor([0, 1, 5, 50], device=device)[index % 4].to(torch.int32),
        torch.tensor([1.0, 0.9, 0.5, 1.0, 0.3], device=device)[index % 5],
        torch.randint(-(2**62), 2**62, (rows,), device=device),
        torch.randint(0, 999, (rows,), device=device),
        torch.randint(0, vocab, (rows,), device=device) if drafts else torch.full((rows,), -1, device=device),
    )


def _verify(rows: int, vocab: int, kind: str, dtype: torch.dtype, device: torch.device) -> Results:
    from kernels.reference.sampling import Allowed, Biases, DraftWeights, Penalties
    from kernels.reference.sampling import verify as reference
    from kernels.triton.sampling import verify

    # No two logits alike: where bfloat16 ties the two largest, either is right, and this is not the place to say so.
    logits = (3.0 * torch.randn(rows, vocab, device=device)).to(dtype)
    logits[torch.arange(rows), torch.randint(0, vocab, (rows,), device=device)] += 20.0
    what = sample_rows(rows, vocab, device, drafts=kind != "no drafts")
    if kind != "no drafts":
        what.drafts[::2] = logits.argmax(1)[::2]
    options: dict[str, Any] = {}
    words = -(-vocab // 32)

    def bits() -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (4, words), device=device).to(torch.int32)

    lines = (torch.arange(rows, device=device) % 4).to(torch.int32)
    if kind in ("drawn drafts", "everything"):
        weights = logits.float() * 0.7 + torch.randn(rows, vocab, device=device)
        options["draft"] = DraftWeights(weights, weights.logsumexp(1))
    if kind in ("biases", "everything"):
        values = torch.randn(4, vocab, device=device) * 3.0
        values[torch.rand(4, vocab, device=device) < 0.1] = -torch.inf
        options["biases"] = Biases(values, lines.flip(0) - 1)
    if kind in ("penalties", "everything"):
        counts = torch.randint(0, 3, (4, vocab), device=device).to(torch.int32)
        strength = [torch.rand(rows, device=device) for _ in range(3)]
        options["penalties"] = Penalties(counts, bits(), (lines + 1) % 4 - 1, strength[0], strength[1], strength[2] + 1.0, lines)
    if kind in ("allowed tokens", "everything"):
        options["allowed"] = Allowed(bits(), lines - 1)
    attempt = torch.tensor([77], device=device)
    exact = reference(logits.double(), what, attempt, **options)
    with poisoned_allocations():
        made = verify(logits, what, attempt, **options)
    return (made.tokens, made.stands, made.finite), (exact.tokens, exact.stands, exact.finite)


def _cut(room: int, device: torch.device) -> Results:
    """Numbers so close that the first walks leave many of them, in steps that are narrower than the row."""
    from kernels.reference.sampling import verify as reference
    from kernels.triton import sampling

    logits = 0.01 * torch.randn(12, 1500, device=device)
    logits[4:8] = logits[4:8].abs().round(decimals=3) - 30.0
    logits[8:] = 0.0
    what = sample_rows(12, 1500, device, drafts=True)
    what.modes.fill_(2)
    what.top_ks.copy_(torch.tensor([0, 40, 900], device=device).repeat(4))
    what.top_ps.copy_(torch.tensor([0.9, 1.0, 0.7], device=device).repeat(4))
    attempt = torch.tensor([5], device=device)
    exact = reference(logits.double(), what, attempt)
    with mock.patch.multiple(sampling, _BLOCK=256, _ROOM=room, _WARPS=4), poisoned_allocations():
        made = sampling.verify(logits, what, attempt)
    return (made.tokens, made.stands), (exact.tokens, exact.stands)


def _not_finite(device: torch.device) -> Results:
    from kernels.triton.sampling import verify

    logits = torch.randn(4, 40, device=device)
    logits[0, 3], logits[1, 39], logits[2] = float("nan"), float("inf"), float("-inf")
    made = verify(logits, sample_rows(4, 40, device, drafts=True), torch.tensor([1], device=device))
    return (made.finite,), (torch.tensor([False, False, False, True], device=device),)


def _same_noise(device: torch.device) -> Results:
    """All logits equal, so that noise alone decides: a single wrong bit of it would show."""
    from kernels.reference.sampling import verify as reference
    from kernels.triton.sampling import verify

    what = sample_rows(30, 300, device, drafts=True)
    what.top_ks.zero_()
    what.top_ps.fill_(1.0)
    logits, attempt = torch.zeros(30, 300, device=device), torch.tensor([5], device=device)
    made, exact = verify(logits, what, attempt), reference(logits.double(), what, attempt)
    return (made.tokens, made.stands), (exact.tokens, exact.stands)


def _log_probs(rows: int, vocab: int, top: int, device: torch.device) -> Results:
    from kernels.reference.sampling import token_log_probs as reference
    from kernels.triton.sampling import token_log_probs

    logits, tokens = 3.0 * torch.randn(rows, vocab, device=device), torch.randint(0, vocab, (rows,), device=device)
    logits[0, 5] = logits[0, 9] = 40.0  # equal ones by id
    wanted = torch.randint(0, rows, (rows + 3,), device=device)
    wanted[0] = 0
    tokens = tokens[wanted]
    exact = reference(logits.double(), wanted, tokens, top)
    with poisoned_allocations():
        made = token_log_probs(logits, wanted, tokens, top)
    return (made[0], made[2], made[1]), (exact[0], exact[2], exact[1])


def _accept(device: torch.device, *, tallied: bool) -> Results:
    from kernels.reference.sampling import Tally, Verdict
    from kernels.reference.sampling import accept_drafts as reference
    from kernels.triton.sampling import accept_drafts

    finite = torch.ones(30, dtype=torch.bool, device=device)
    finite[13] = False
    verdict = Verdict(torch.randint(0, 99, (30,), device=device), torch.rand(30, device=device) < 0.7, finite)
    bounds = torch.tensor([0, 4, 5, 5, 12, 30], dtype=torch.int32, device=device)
    counts = [torch.ones(3, 99, dtype=torch.int32, device=device) for _ in range(2)]
    drafts = torch.randint(0, 9, (30,), device=device)  # few, so that some are counted twice
    lines = torch.tensor([2, -1, 1, -1, 0], dtype=torch.int32, device=device)
    tallies = [Tally(held, lines, drafts) if tallied else None for held in counts]
    with poisoned_allocations():
        made = accept_drafts(verdict, bounds, tallies[0])
    exact = reference(verdict, bounds, tallies[1])
    return (made, counts[0]), (exact, counts[1])


# --- drafting and FP8 ---------------------------------------------------------------------------------------------------------


def _head_cases(*, full: bool) -> Iterator[Case]:
    sizes = ((3, 2, 300, 10, 24),) if not full else ((3, 2, 300, 10, 24), (40, 7, 151_936, 2560, 256))
    for shape in sizes:
        for kind in ("none", "vanilla", "gated", "rnn"):
            for mapped in (False, True):
                run = partial(_sequential_head, shape, kind, torch.float32, mapped=mapped)
                yield Case("sequential_head", f"{kind} {shape}{' mapped' if mapped else ''}", run, 1e-4)
    run = partial(_sequential_head, (3, 2, 3000, 10, 24), "vanilla", torch.float32, mapped=False)
    yield Case("sequential_head", "several tiles a program", run, 1e-4)
    for kind in ("vanilla", "gated"):
        run = partial(_sequential_head, (5, 1, 300, 10, 24), kind, torch.float32, mapped=False, clear=False)
        yield Case("sequential_head", f"{kind}, no clear winner", run, 1e-4)
    for dtype in (torch.bfloat16,) if not full else HALF_TYPES:
        yield Case(
            "sequential_head", f"vanilla, {str(dtype)[6:]}", partial(_sequential_head, sizes[-1], "vanilla", dtype, mapped=False), 0.02
        )


def _sequential_head(
    shape: tuple[int, ...], kind: Any, dtype: torch.dtype, device: torch.device, *, mapped: bool, clear: bool = True
) -> Results:
    """One position's tokens decide the next one's logits: of several positions, winners must be `clear`, or rounding would send the two
    down different paths.
    """
    from kernels.reference.sequential_head import SequentialHead
    from kernels.reference.sequential_head import sequential_head as reference
    from kernels.triton.sequential_head import sequential_head

    size, length, vocab, hidden_size, rank = shape
    generator = torch.Generator(device).manual_seed(torch.initial_seed() % 2**31 + hash(kind) % 7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    rows = {"gated": (rank, hidden_size + rank), "rnn": (3 * rank, 2 * rank + hidden_size)}.get(kind)
    plain = kind == "none"
    tensors = (
        None if plain else normal(2 * vocab, rank),
        None if plain else normal(vocab, rank) * rank**-0.5,
        None if rows is None else normal(*rows) * rows[1] ** -0.5,
        None if rows is None else normal(rows[0]),
        normal(hidden_size if plain else hidden_size + rank) * hidden_size**-0.5,
        normal(1),
    )
    ids = torch.randperm(2 * vocab, device=device)[:vocab] if mapped else None
    logits, hidden = 3 * normal(size, length, vocab), normal(size, length, hidden_size)
    if clear:
        logits[torch.arange(size)[:, None], torch.arange(length), torch.randint(0, vocab, (size, length), device=device)] += 40.0
    anchors = torch.randint(0, vocab, (size,), device=device)
    keys = torch.randint(-(2**62), 2**62, (size, length), device=device)
    options = {"temperatures": torch.tensor([0.0, 0.7, 1.0], device=device).repeat(size)[:size], "keys": keys, "keep_weights": True}
    exact = reference(logits.double(), hidden.double(), anchors, SequentialHead(kind, *map(_double, tensors), ids), **options)
    with poisoned_allocations():
        made = sequential_head(logits, hidden, anchors, SequentialHead(kind, *tensors, ids), **options)
    parts = [(block.tokens, block.lse, block.peak, block.confidence, block.log_weights) for block in (made, exact)]
    return parts[0], parts[1]


def _fp8_cases(*, full: bool) -> Iterator[Case]:
    shapes = [(3, 256, 150, (128, 128)), (17, 100, 40, (1, 100)), (40, 200, 70, (70, 200))]
    if full:
        shapes += [(1, 4096, 4096, (128, 128)), (64, 4096, 12288, (128, 128)), (700, 2560, 1000, (1, 2560))]
    for rows, depth, columns, block in shapes:
        for dtype in (torch.float32, *HALF_TYPES) if full or rows == 3 else (torch.float16,):
            run = partial(_fp8_linear, rows, depth, columns, block, dtype)
            yield Case("fp8_linear", f"{rows}x{depth}x{columns} in {block}, {str(dtype)[6:]}", run, TOLERANCES[dtype])


def _fp8_linear(rows: int, depth: int, columns: int, block: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Results:
    from kernels.reference.fp8_linear import Fp8Linear
    from kernels.reference.fp8_linear import fp8_linear as reference
    from kernels.triton.fp8_linear import fp8_linear

    weight = torch.randn(columns, depth, device=device).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-columns // block[0]), -(-depth // block[1]), device=device) + 0.5
    x, bias, residual = (torch.randn(*shape, device=device).to(dtype) for shape in ((rows, depth), (columns,), (rows, columns)))
    exact = reference(x.double(), Fp8Linear(weight, scale, block, bias.double()), residual.double())
    with poisoned_allocations():
        made = fp8_linear(x, Fp8Linear(weight, scale, block, bias), residual)
    return (made,), (exact,)


def _survival(size: int, drafts: int, device: torch.device) -> torch.Tensor:
    survival = torch.rand(size, drafts, device=device).cumprod(1)
    survival[0, drafts // 2 :] = 0.0
    if size > 2:
        survival[1] = survival[2]  # equals go by position
    return survival


def _allocate_top(size: int, drafts: int, device: torch.device) -> Results:
    from kernels.reference.draft_budget import allocate_top as reference
    from kernels.triton.draft_budget import allocate_top

    survival = _survival(size, drafts, device)
    capacities = [torch.tensor([count], device=device) for count in (0, 1, size * drafts // 3, size * drafts + 9)]
    with poisoned_allocations():
        made = [allocate_top(survival, count) for count in capacities]
    return made, [reference(survival, count) for count in capacities]


# --- what is refused ----------------------------------------------------------------------------------------------------------


def refusals(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """(a part of the message, a call that must raise ValueError with it)."""
    from kernels.reference.fp8_linear import Fp8Linear
    from kernels.triton import draft_budget, gated_activation, kv_write, rms_norm, sampling
    from kernels.triton.attention import paged_attention
    from kernels.triton.fp8_linear import fp8_linear

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    cache, step = zeros(3, 2, 4, 8), (zeros(1, 2).int(), torch.tensor([0, 3], device=device).int(), zeros(1).int() + 3)
    yield "weight must have shape (4,)", lambda: rms_norm.rms_norm(zeros(2, 4), zeros(3), 1e-5)
    yield "must be alike", lambda: rms_norm.add_rms_norm(zeros(2, 4), zeros(2, 3), zeros(4), 1e-5)
    yield "even number of columns, got 3", lambda: gated_activation.gated_activation(zeros(1, 3), "silu")
    yield "float16, bfloat16 or float32, got torch.float64", lambda: paged_attention(zeros(3, 4, 8).double(), cache, cache, *step, 1.0)
    yield "5 query heads cannot share 2", lambda: paged_attention(zeros(3, 5, 8), cache, cache, *step, 1.0)
    yield "do not fit keys (3, 2, 4, 8)", lambda: paged_attention(zeros(3, 4, 9), cache, cache, *step, 1.0)
    yield "or float8_e4m3fn, got torch.float16", lambda: paged_attention(zeros(3, 4, 8), cache.half(), cache.half(), *step, 1.0)
    yield (
        "have another width than (3, 40)",
        lambda: kv_write.rotary_kv_write(zeros(3, 40), None, None, zeros(3).long(), cache, cache, num_heads=2),
    )
    yield "top must be between 0 and 4, got 5", lambda: sampling.token_log_probs(zeros(2, 4), zeros(2).long(), zeros(2).long(), 5)
    yield "modes must be torch.int32 [2]", lambda: sampling.verify(zeros(2, 9), sample_rows(3, 9, device, drafts=False), zeros(1).long())
    yield "at most 8192 candidates", lambda: draft_budget.allocate_top(zeros(600, 16), zeros(1).long())
    yield (
        "multiple of 128 inputs or all",
        lambda: fp8_linear(zeros(1, 96), Fp8Linear(zeros(4, 96, dtype=torch.float8_e4m3fn), zeros(4, 3), (1, 32))),
    )


def check_refusals(device: torch.device) -> int:
    count = 0
    for message, call in refusals(device):
        try:
            call()
        except ValueError as error:
            assert message in str(error), f"{message!r} is not in {error}"  # noqa: PT017 - no pytest in the interpreter's process
        else:
            raise AssertionError(f"taken, but {message!r} was expected")
        count += 1
    return count


def hollow() -> None:
    """Makes every launch do nothing, as if the kernels' bodies were empty."""
    from triton.runtime.jit import KernelInterface

    KernelInterface.__getitem__ = lambda self, grid: lambda *args, **kwargs: None  # type: ignore[method-assign]


def fails(case: Case) -> bool:
    try:
        case.check(torch.device("cpu"))
    except (AssertionError, IndexError):  # a poisoned token may be no index
        return True
    return False


def main(only: str) -> None:
    """Runs the cases whose op or name contains `only`, and prints the number of cases by op. `--part=I/N` runs every N-th case from the
    I-th on; `--hollow` instead prints those that empty kernels would pass.
    """
    cpu, done = torch.device("cpu"), Counter[str]()
    torch.set_num_threads(1)
    if only == "--hollow":
        hollow()
        sys.stdout.write("".join(f"{case.op}/{case.name}\n" for case in cases(full=False) if not fails(case)))
        return
    first, step = 0, 1
    if only.startswith("--part="):
        first, step = (int(number) for number in only.removeprefix("--part=").split("/"))
        only = ""
    for case in list(cases(full=False))[first::step]:
        if only in case.op or only in case.name:
            case.check(cpu)
            done[case.op] += 1
    done["refusals"] = check_refusals(cpu)
    sys.stdout.write("\n".join(f"{op} {count}" for op, count in sorted(done.items())) + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
