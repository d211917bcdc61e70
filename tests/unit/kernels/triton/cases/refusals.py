"""What the ops refuse, and what they say then."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tests.unit.kernels.triton.cases.vocabulary import sample_rows


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
