"""The honest bound of a job: its positions through the fastest matrix product that this machine showed in the same run.

    seconds = body * (P + G - N) + head * G

P: prompt positions (with prefix caching allowed, distinct ones, see `Prompts.distinct_positions`); G: generated tokens; N: lines,
whose last token is never fed back; body and head: seconds a position of all layers' products and of the output head, each at the row
count and in the layout where it is cheapest. No attention, norms, sampling or padding. Drafts that stand do not change it: their
positions count too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from service.cli.bench.plan import Task
from service.cli.bench.prompts import Prompts

if TYPE_CHECKING:
    import torch

_ROWS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 1024)
_REPEATS = 3
_JOINED = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}


def measure(task: Task) -> dict[str, Any]:
    """The rates, and the positions of the job, as plain data: what `of_job` reckons with."""
    import torch

    prompts = Prompts(task)
    layers, head = _weights(prompts)
    with torch.inference_mode():
        body, head_rate = _fastest(layers), _fastest([head])
    return {
        "body_seconds": body[0],
        "head_seconds": head_rate[0],
        "body_at": body[1],
        "head_at": head_rate[1],
        "gflops": 2e-9 * sum(weight.numel() for weight in layers) / body[0],
        "prompt_positions": prompts.distinct_positions(shared=False),
        "distinct_prompt_positions": prompts.distinct_positions(shared=True),
        "lines": len(prompts.all),
    }


def of_job(measured: dict[str, Any], generated: int) -> dict[str, Any]:
    """Tokens a second that no engine passes on this job without better products: with shared prefixes, and without."""

    def rate(prompt: int) -> float:
        seconds = measured["body_seconds"] * (prompt + generated - measured["lines"]) + measured["head_seconds"] * generated
        return float(round(generated / seconds, 2))

    return {
        "tokens_per_second": rate(measured["distinct_prompt_positions"]),
        "tokens_per_second_without_sharing": rate(measured["prompt_positions"]),
        "formula": "generated / (body_seconds * (prompt positions + generated - lines) + head_seconds * generated)",
        "output_tokens": generated,
        **measured,
    }


def _weights(prompts: Prompts) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every layer's matrices, those that share an input joined, and the head."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(prompts.folder, dtype=torch.float32)
    head = model.get_output_embeddings().weight.detach()
    joined: dict[tuple[str, str], list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not head and not name.endswith("lm_head"):
            parent, _, own = name.rpartition(".")
            kind = next((kind for kind, parts in _JOINED.items() if own in parts), own)
            joined.setdefault((parent, kind), []).append(module.weight.detach())
    return [torch.cat(parts) for parts in joined.values()], head


def _fastest(weights: list[torch.Tensor]) -> tuple[float, tuple[int, str]]:
    """Least seconds a position of all `weights` one after the other, over row counts and layouts."""
    import torch

    from kernels.reference import linear as ours

    def laid_out(
        pack: Callable[[torch.Tensor], Any], product: Callable[[torch.Tensor, Any], object]
    ) -> Callable[[int], Callable[[], object]]:
        packed = [pack(weight) for weight in weights]

        def of(rows: int) -> Callable[[], object]:
            inputs = {width: torch.randn(rows, width) for width in {weight.shape[1] for weight in weights}}
            pairs = [(inputs[weight.shape[1]], one) for weight, one in zip(weights, packed, strict=True)]
            return lambda: [product(x, one) for x, one in pairs]

        return of

    layouts = {
        "plain": laid_out(lambda weight: weight, torch.nn.functional.linear),
        "ours": laid_out(ours.pack_linear, ours.linear),
    }
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call] # torch annotates it in some versions only
        product = torch.ops.mkldnn._linear_pointwise
        reorder = torch.ops.mkldnn._reorder_linear_weight
        layouts["onednn"] = laid_out(lambda weight: reorder(weight, None), lambda x, one: product(x, one, None, "none", [], ""))
    return min((_seconds(layout(rows)) / rows, (rows, name)) for name, layout in layouts.items() for rows in _ROWS)


def _seconds(run: Callable[[], object]) -> float:
    """The best of a few."""
    run()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)
