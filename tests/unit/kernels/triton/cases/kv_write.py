"""Keys and values on their way into the cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kernels.testing import TOLERANCES, Case, poisoned_allocations
from tests.unit.kernels.triton.cases.common import HALF_TYPES, Results, double


def kv_cases(*, full: bool) -> Iterator[Case]:
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
        qkv.double(), *(double(t) for t in turn), slots, k_exact, v_exact, q_norm=double(norms[0]), k_norm=double(norms[1]), **options
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
