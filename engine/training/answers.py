"""Answers of the target itself, generated with our own engine and kept as they come: an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.types import FinishReason, Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from engine.engine import Engine
    from engine.tokenizer import Tokenizer
    from engine.training.prompts import Prompt
    from engine.training.report import Report


@dataclass(frozen=True, slots=True)
class Text:
    """One answered prompt. tokens: prompt and answer; the answer begins at `prompt_length`."""

    id: str
    tokens: tuple[int, ...]
    prompt_length: int


def encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """As a chat where the model has a template, else as plain text."""
    if getattr(tokenizer.hf, "chat_template", None):
        return tokenizer.encode_chat([{"role": "user", "content": text}])
    return tokenizer.encode(text)


def answer(
    engine: Engine, prompts: Sequence[Prompt], path: Path, *, samples: int, temperature: float, max_tokens: int, report: Report
) -> None:
    """Appends what is still missing of `samples` answers a prompt to `path` (JSONL). The first is greedy, the others at `temperature`."""
    done = {text.id for text in read(path)} if path.exists() else set()
    made = list(_requests(engine, prompts, done, samples, temperature, max_tokens))
    if not made:
        return
    lengths = {request.id: request for request in made}
    with path.open("a", encoding="utf-8") as out:
        for count, result in enumerate(engine.run(iter(made)), 1):
            if result.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
                continue
            prompt = lengths[result.id].prompt_token_ids
            out.write(json.dumps({"id": result.id, "prompt": prompt, "answer": result.token_ids}) + "\n")
            out.flush()
            report.tick(path.name, count, len(made))


def read(path: Path) -> Iterator[Text]:
    """A line that a crash cut off in the middle is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            value = json.loads(line)
            yield Text(value["id"], (*value["prompt"], *value["answer"]), len(value["prompt"]))


def _requests(
    engine: Engine, prompts: Sequence[Prompt], done: set[str], samples: int, temperature: float, max_tokens: int
) -> Iterator[Request]:
    from engine.training.prompts import part_of

    room = engine.spec.max_positions - 1
    for prompt in prompts:
        tokens = encode(engine.tokenizer, prompt.text)
        if len(tokens) >= room:
            continue
        for sample in range(samples):
            # Named by content, so that another order of the prompts file changes nothing.
            name = f"{part_of(prompt.text)}-{hash_of(prompt.text)}-{sample}"
            if name in done:
                continue
            params = SamplingParams(max_tokens=min(max_tokens, room - len(tokens)), temperature=temperature if sample else 0.0, seed=sample)
            yield Request(name, tokens, params)


def hash_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:16]
