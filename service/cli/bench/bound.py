"""The honest bound of a job: its positions through the fastest matrix product that this machine showed in the same run.

    seconds = body * (P + G - N) + head * G

P: prompt positions (with prefix caching allowed, distinct ones, see `Prompts.distinct_positions`); G: generated tokens; N: lines,
whose last token is never fed back; body and head: seconds a position of all layers' products and of the output head, each at the row
count and in the layout where it is cheapest. No attention, norms, sampling or padding. Drafts that stand do not change it: their
positions count too.

A shared machine's speed changes within seconds, so the rate at its best moment is nothing that a job could keep: the fastest product is
looked for once, by shortest times, and the few that come first run in turns for some seconds before each of the runs that are held to
them. The fastest by the median of those stretches is the bound; what the best moment would allow is reported beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import TYPE_CHECKING, Any

from service.cli.bench.plan import Task
from service.cli.bench.prompts import Prompts

if TYPE_CHECKING:
    import torch

    Product = Callable[[], object]
    Layout = Callable[[int], Product]
    """From rows to all products of so many."""

_ROWS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 1024)
_REPEATS = 2
_FINALISTS = 3
_STRETCH = 1.5
"""Seconds that the finalists of body and of head are run for together, if `_REPEATS` times each do not take longer."""
_JOINED = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}


def measure(task: Task) -> dict[str, Any]:
    """One stretch as plain data: the positions of the job, and `body` and `head`, of each finalist {"rows", "layout", "seconds" a position
    over the stretch, "least" in a moment}. Options of the task: what an earlier one gave, where the finalists were found.
    """
    import torch

    prompts = Prompts(task)
    layers, head = _weights(prompts)
    with torch.inference_mode():
        rates = {name: _rates(_layouts(weights), task.options.get(name)) for name, weights in (("body", layers), ("head", [head]))}
    return rates | {
        "prompt_positions": prompts.distinct_positions(shared=False),
        "distinct_prompt_positions": prompts.distinct_positions(shared=True),
        "lines": len(prompts.all),
        "body_parameters": sum(weight.numel() for weight in layers),
    }


def of_job(stretches: list[dict[str, Any]], generated: int) -> dict[str, Any]:
    """Tokens a second that no engine keeps up on this job without better products; also without shared prefixes, and at the best moment."""
    distinct, prompt, lines = (stretches[0][name] for name in ("distinct_prompt_positions", "prompt_positions", "lines"))
    body, head = (min(map(median, _by_finalist(stretches, name, "seconds"))) for name in ("body", "head"))
    best_body, best_head = (min(map(min, _by_finalist(stretches, name, "least"))) for name in ("body", "head"))

    def rate(positions: int, body: float, head: float) -> float:
        return float(round(generated / (body * (positions + generated - lines) + head * generated), 2))

    return {
        "tokens_per_second": rate(distinct, body, head),
        "tokens_per_second_without_sharing": rate(prompt, body, head),
        "tokens_per_second_at_best": rate(distinct, best_body, best_head),
        "formula": "generated / (body_seconds * (prompt positions + generated - lines) + head_seconds * generated)",
        "output_tokens": generated,
        "prompt_positions": prompt,
        "distinct_prompt_positions": distinct,
        "lines": lines,
        "body_seconds": body,
        "head_seconds": head,
        "gflops": 2e-9 * stretches[0]["body_parameters"] / body,
        "stretches": stretches,
    }


def _by_finalist(stretches: list[dict[str, Any]], name: str, figure: str) -> list[list[float]]:
    return [[rate[figure] for rate in rates] for rates in zip(*(one[name] for one in stretches), strict=True)]


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


def _layouts(weights: list[torch.Tensor]) -> dict[str, Layout]:
    """All products of `weights` one after the other, in every layout that there is, packed at first use."""
    import torch

    from kernels.reference import linear as ours

    def laid_out(pack: Callable[[torch.Tensor], Any], product: Callable[[torch.Tensor, Any], object]) -> Layout:
        packed = cache(lambda: [pack(weight) for weight in weights])

        def of(rows: int) -> Product:
            inputs = {width: torch.randn(rows, width) for width in {weight.shape[1] for weight in weights}}
            pairs = [(inputs[weight.shape[1]], one) for weight, one in zip(weights, packed(), strict=True)]
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
    return layouts


def _rates(layouts: dict[str, Layout], known: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    if known is None:
        tried = ((min(_times([layout(rows)])[0]) / rows, rows, name) for name, layout in layouts.items() for rows in _ROWS)
        finalists = [(rows, name) for _, rows, name in sorted(tried)[:_FINALISTS]]
    else:
        finalists = [(one["rows"], one["layout"]) for one in known]
    times = _times([layouts[layout](rows) for rows, layout in finalists], _STRETCH)
    return [
        {"rows": rows, "layout": layout, "seconds": sum(own) / len(own) / rows, "least": min(own) / rows}
        for (rows, layout), own in zip(finalists, times, strict=True)
    ]


def _times(runs: list[Product], stretch: float = 0.0) -> list[list[float]]:
    """Seconds of each, a few times in turns, and as often as a stretch of so many seconds goes on."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    while len(times[0]) < _REPEATS or sum(map(sum, times)) < stretch:
        for run, own in zip(runs, times, strict=True):
            started = time.perf_counter()
            run()
            own.append(time.perf_counter() - started)
    return times
