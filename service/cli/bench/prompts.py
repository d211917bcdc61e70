"""The job as every engine gets it: prompts as token ids, and the way back from tokens to a line's answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.tokenizer import Tokenizer
from service.adapters.engine_runner import checkpoint_folder
from service.adapters.prompts import encode_prompts
from service.cli.bench.plan import Answer, BenchLine, Task
from service.config import ModelEntry
from service.domain.request_body import GenerationRequest, parse_body


@dataclass(frozen=True, slots=True)
class Prompt:
    """`max_tokens`: what the line asks for, else what is left of the context."""

    custom_id: str
    asked: GenerationRequest
    tokens: list[int]
    max_tokens: int


class Prompts:
    """Of one job on one model. `ends`: its end tokens."""

    def __init__(self, task: Task) -> None:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        self.folder = checkpoint_folder(ModelEntry(**task.entry), Path(task.cache_dir))
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self._tokenizer = Tokenizer(tokenizer)
        self._context = AutoConfig.from_pretrained(self.folder).max_position_embeddings
        ends = GenerationConfig.from_pretrained(self.folder).eos_token_id
        if ends is None:
            ends = tokenizer.eos_token_id
        self.ends = frozenset([ends] if isinstance(ends, int) else ends)
        self.all = [self._prompt(line) for line in task.lines]

    def answer(self, prompt: Prompt, tokens: Sequence[int]) -> Answer:
        """A line's own answer out of what was generated: up to its limit, its end token or its stop string."""
        tokens = list(tokens[: prompt.max_tokens])
        tokens = tokens[: next((index + 1 for index, token in enumerate(tokens) if token in self.ends), len(tokens))]
        if prompt.asked.stop:
            for count in range(1, len(tokens) + 1):
                text = self._tokenizer.decode(tokens[:count])
                places = [place for stop in prompt.asked.stop if (place := text.find(stop)) >= 0]
                if places:
                    return text[: min(places)], count
        return self._tokenizer.decode(tokens), len(tokens)

    def distinct_positions(self, *, shared: bool) -> int:
        """Prompt positions to compute: all, or with `shared` prefixes each distinct one once."""
        tokens = [prompt.tokens for prompt in self.all]
        return distinct_positions(tokens) if shared else sum(map(len, tokens))

    def _prompt(self, line: BenchLine) -> Prompt:
        asked = parse_body(line.endpoint, line.body)
        if asked.choices > 1:
            raise ValueError(f"line {line.custom_id!r} asks for {asked.choices} answers; the benchmark compares one answer a line")
        tokens = list(encode_prompts(self._tokenizer, asked)[0].tokens)
        return Prompt(line.custom_id, asked, tokens, asked.max_tokens or self._context - len(tokens))


def distinct_positions(prompts: Iterable[Sequence[int]]) -> int:
    """Positions that a cache which forgets nothing computes: of equal beginnings one, and of every prompt at least its last."""
    count, before = 0, list[int]()
    for tokens in sorted(map(list, prompts)):
        common = 0
        while common < min(len(tokens), len(before)) and tokens[common] == before[common]:
            common += 1
        count += max(len(tokens) - common, 1)
        before = tokens
    return count


def wire_job(prompts: Prompts, scratch: Path, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    """What a peer's driver reads (see `peers.wire.Job`)."""
    return {
        "model": str(prompts.folder),
        "scratch": str(scratch),
        "prompts": [{"id": prompt.custom_id, "tokens": prompt.tokens, "max_tokens": prompt.max_tokens} for prompt in prompts.all],
        "ends": sorted(prompts.ends),
        "threads": threads,
        "options": options,
    }
