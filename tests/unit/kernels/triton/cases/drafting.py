"""What drafters need: the sequential head, and the budget that drafts of all sequences share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from kernels.testing import Case, poisoned_allocations
from tests.unit.kernels.triton.cases.common import HALF_TYPES, Results, double


def head_cases(*, full: bool) -> Iterator[Case]:
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
    for kind in ("vanilla", "gated", "rnn"):
        yield Case("sequential_head", f"{kind}, rows without a number", partial(_without_numbers, kind))
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
    normal = _normal(kind, dtype, device)
    tensors = _head_tensors(kind, vocab, hidden_size, rank, normal)
    ids = torch.randperm(2 * vocab, device=device)[:vocab] if mapped else None
    logits, hidden = 3 * normal(size, length, vocab), normal(size, length, hidden_size)
    if clear:
        logits[torch.arange(size)[:, None], torch.arange(length), torch.randint(0, vocab, (size, length), device=device)] += 40.0
    anchors = torch.randint(0, vocab, (size,), device=device)
    keys = torch.randint(-(2**62), 2**62, (size, length), device=device)
    options = {"temperatures": torch.tensor([0.0, 0.7, 1.0], device=device).repeat(size)[:size], "keys": keys, "keep_weights": True}
    exact = reference(logits.double(), hidden.double(), anchors, SequentialHead(kind, *map(double, tensors), ids), **options)
    with poisoned_allocations():
        made = sequential_head(logits, hidden, anchors, SequentialHead(kind, *tensors, ids), **options)
    parts = [(block.tokens, block.lse, block.peak, block.confidence, block.log_weights) for block in (made, exact)]
    return parts[0], parts[1]


def _normal(kind: Any, dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    generator = torch.Generator(device).manual_seed(torch.initial_seed() % 2**31 + hash(kind) % 7)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device).to(dtype)


def _head_tensors(
    kind: Any, vocab: int, hidden_size: int, rank: int, normal: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """w1 (of twice the vocabulary), w2, mix_weight, mix_bias, confidence_weight, confidence_bias."""
    rows = {"gated": (rank, hidden_size + rank), "rnn": (3 * rank, 2 * rank + hidden_size)}.get(kind)
    plain = kind == "none"
    return (
        None if plain else normal(2 * vocab, rank),
        None if plain else normal(vocab, rank) * rank**-0.5,
        None if rows is None else normal(*rows) * rows[1] ** -0.5,
        None if rows is None else normal(rows[0]),
        normal(hidden_size if plain else hidden_size + rank) * hidden_size**-0.5,
        normal(1),
    )


def _without_numbers(kind: Any, device: torch.device) -> Results:
    """What a sequence drafts whose logits are NaN are tokens all the same, and no others than its own suffer."""
    from kernels.reference.sequential_head import SequentialHead
    from kernels.triton.sequential_head import sequential_head

    size, length, vocab, hidden_size, rank = 3, 2, 300, 10, 24
    normal = _normal(kind, torch.float32, device)
    head = SequentialHead(kind, *_head_tensors(kind, vocab, hidden_size, rank, normal))
    logits, hidden, anchors = 3 * normal(size, length, vocab), normal(size, length, hidden_size), torch.arange(size, device=device)
    sound = sequential_head(logits, hidden, anchors, head).tokens
    logits[1] = float("nan")
    with poisoned_allocations():
        tokens = sequential_head(logits, hidden, anchors, head).tokens
    return (tokens[::2], (tokens[1] >= 0) & (tokens[1] < vocab)), (sound[::2], torch.ones(length, dtype=torch.bool, device=device))


def budget_cases(*, full: bool) -> Iterator[Case]:
    for size, drafts in ((1, 4), (5, 7), (13, 3), *(((256, 16), (1, 64)) if full else ())):
        yield Case("allocate_top", f"{size}x{drafts}", partial(_allocate_top, size, drafts))


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
