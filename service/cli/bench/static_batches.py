"""transformers' `generate` on static, left-padded batches, prompts of similar length side by side.

With batch size 1 and float32 it is the reference that answers are compared with. With prompt lookup (its own speculation, batch size 1
only) it drafts from the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from service.cli.bench.child import Measured
from service.cli.bench.plan import Task
from service.cli.bench.prompts import Prompt, Prompts

if TYPE_CHECKING:
    import torch


def run(task: Task, progress: Callable[[int], None]) -> Measured:
    """Batches of `options["batch_size"]`; a batch runs until its last line has ended, and every line is cut at its own limit."""
    import torch
    from transformers import AutoModelForCausalLM

    prompts = Prompts(task)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(prompts.folder, dtype=getattr(torch, task.dtype)).to(device).eval()
    ordered = sorted(prompts.all, key=lambda prompt: len(prompt.tokens))
    measured = Measured(0.0, device=str(device))
    size = task.options["batch_size"]
    extra = {"prompt_lookup_num_tokens": lookup} if (lookup := task.options.get("prompt_lookup")) else {}
    progress(0)
    started = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(ordered), size):
            batch = ordered[first : first + size]
            for prompt, answer in zip(batch, _generate(model, batch, prompts.ends, device, extra), strict=True):
                measured.answers[prompt.custom_id] = prompts.answer(prompt, answer)
            progress(len(measured.answers))
    measured.seconds = time.perf_counter() - started
    return measured


def _generate(model: Any, batch: Sequence[Prompt], ends: frozenset[int], device: torch.device, extra: dict[str, Any]) -> list[list[int]]:
    import torch

    width = max(len(prompt.tokens) for prompt in batch)
    pad = min(ends)
    ids = torch.tensor([[pad] * (width - len(prompt.tokens)) + prompt.tokens for prompt in batch], device=device)
    mask = torch.tensor([[0] * (width - len(prompt.tokens)) + [1] * len(prompt.tokens) for prompt in batch], device=device)
    generated = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max(prompt.max_tokens for prompt in batch),
        do_sample=False,
        # The checkpoint's own sampling settings say nothing here, and transformers would warn about them.
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        **extra,
    )
    rows: list[list[int]] = generated[:, width:].tolist()
    return rows
