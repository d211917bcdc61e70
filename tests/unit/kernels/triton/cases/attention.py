"""Attention over a paged cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch

from kernels.testing import TOLERANCES, Case, paged_inputs, poisoned_allocations
from tests.unit.kernels.triton.cases.common import HALF_TYPES, Results, double

MIXED = {"queries": (1, 5, 17, 129), "contexts": (40, 5, 61, 140)}
FEW = {"queries": (1, 5, 3), "contexts": (95, 33, 120)}


def attention_cases(*, full: bool) -> Iterator[Case]:
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
        inputs.q.double(), double(inputs.k_cache), double(inputs.v_cache), *place, scale, soft_cap=soft_cap, **step, **scales
    )
    values = inputs.v_cache.transpose(1, 2).contiguous().transpose(1, 2) if apart else inputs.v_cache
    near = mock.patch("kernels.triton.attention._NEAR", 0) if apart else contextlib.nullcontext()
    with poisoned_allocations(), near:
        made = attention(inputs.q, inputs.k_cache, values, plan, scale, soft_cap, **scales)
    return (made,), (exact,)
