"""The comparison: transformers' `generate` on static, left-padded batches, prompts of similar length side by side.

With batch size 1 and float32 it is the reference that answers are compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.adapters.engine_runner import checkpoint_folder
from service.cli.bench.child import Answer, Measured
from service.cli.bench.plan import BenchLine, Task
from service.config import ModelEntry
from service.domain.request_body import GenerationRequest, parse_body

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Prompt:
    custom_id: str
    asked: GenerationRequest
    tokens: list[int]
    max_tokens: int


def run(task: Task, progress: Callable[[int], None]) -> Measured:
    """Batches of `task.batch_size`; a batch runs until its last line has ended, and every line is cut at its own limit."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = checkpoint_folder(ModelEntry(**task.entry), Path(task.cache_dir))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, task.dtype)).to(device).eval()
    ends = _end_tokens(model, tokenizer)
    prompts = sorted((_prompt(line, tokenizer, model) for line in task.lines), key=lambda prompt: len(prompt.tokens))
    measured = Measured(0.0, device=str(device))
    started = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(prompts), task.batch_size):
            batch = prompts[first : first + task.batch_size]
            for prompt, answer in zip(batch, _generate(model, batch, ends, device), strict=True):
                measured.answers[prompt.custom_id] = _cut(prompt, answer, ends, tokenizer)
            progress(len(measured.answers))
    measured.seconds = time.perf_counter() - started
    return measured


def _prompt(line: BenchLine, tokenizer: Any, model: Any) -> _Prompt:
    asked = parse_body(line.endpoint, line.body)
    if asked.messages is not None:
        text = tokenizer.apply_chat_template(asked.template_input, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer.encode(text, add_special_tokens=False)
    elif isinstance(asked.prompt, tuple):
        tokens = list(asked.prompt)
    else:
        tokens = tokenizer.encode(asked.prompt)
    room = model.config.max_position_embeddings - len(tokens)
    return _Prompt(line.custom_id, asked, tokens, asked.max_tokens or room)


def _generate(model: Any, batch: Sequence[_Prompt], ends: frozenset[int], device: torch.device) -> list[list[int]]:
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
    )
    rows: list[list[int]] = generated[:, width:].tolist()
    return rows


def _cut(prompt: _Prompt, tokens: list[int], ends: frozenset[int], tokenizer: Any) -> Answer:
    """A line's own answer out of its row: up to its limit, its end token or its stop string."""
    tokens = tokens[: prompt.max_tokens]
    length = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
    tokens = tokens[:length]
    if prompt.asked.stop:
        for count in range(1, len(tokens) + 1):
            text = _decode(tokenizer, tokens[:count])
            places = [place for stop in prompt.asked.stop if (place := text.find(stop)) >= 0]
            if places:
                return text[: min(places)], count
    return _decode(tokenizer, tokens), len(tokens)


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends)
