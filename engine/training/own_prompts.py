"""Prompts of the model's own: it goes on where the beginning of a prompt that trains breaks off.

A few thousand prompts are learned by heart long before a drafter is as good as it can get. A model that is asked for a user's turn gives
one (Magpie, arXiv 2406.08464); begun as a real prompt begins, it stays within that prompt's domain.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

from engine.training.prompts import Prompt, Split, may_train, normal, part_of, read_prompts
from engine.types import FinishReason, Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from engine.engine import Engine
    from engine.tokenizer import Tokenizer
    from engine.training.report import Report

FILE = "own_prompts.jsonl"
_TEMPERATURE, _MAX_TOKENS = 0.9, 160
_SHARES = (0.1, 0.6)
"""How much of a prompt is given, in words: drawn evenly between these."""
_LEAST_WORDS = 6
_MARK = "\ue000"
"""A character of no prompt: where it comes out of a chat template, the user's turn begins."""


def invent(engine: Engine, parts: Split, each: int, data: Path, *, barred: Iterable[str], seed: int, report: Report) -> None:
    """Writes up to `each` prompts a domain to `data`/own_prompts.jsonl, unless the file is there. Prompts that the split knows, that are
    `barred` or whose hash keeps them out of training are left out.
    """
    path = data / FILE
    if path.exists() or not each:
        return
    begun = {request.id: (request, beginning, domain) for request, beginning, domain in _requests(engine, parts, each, seed)}
    seen = {normal(prompt.text) for prompt in (*parts.train, *parts.calibrate, *parts.judged)} | {normal(text) for text in barred}
    found = []
    for count, result in enumerate(engine.run(request for request, _, _ in begun.values()), 1):
        _, beginning, domain = begun[result.id]
        text = beginning + engine.tokenizer.hf.decode(result.token_ids, skip_special_tokens=True)
        if result.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) and normal(text) not in seen and may_train(part_of(text)):
            seen.add(normal(text))
            found.append(Prompt(text, domain))
        report.tick("prompts of the model's own", count, len(begun))
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps({"prompt": prompt.text, "domain": prompt.domain}) + "\n" for prompt in found), encoding="utf-8")
    part.replace(path)


def with_own(parts: Split, data: Path) -> Split:
    """The split with what `invent` left in `data` among the prompts that train."""
    path = data / FILE
    own = read_prompts(path) if path.exists() and path.stat().st_size else []
    return Split((*parts.train, *own), parts.calibrate, parts.judged)


def _requests(engine: Engine, parts: Split, each: int, seed: int) -> Iterator[tuple[Request, str, str]]:
    chosen = random.Random(seed)
    by_domain: dict[str, list[list[str]]] = {}
    for prompt in parts.train:
        if len(words := prompt.text.split(" ")) >= _LEAST_WORDS:
            by_domain.setdefault(prompt.domain, []).append(words)
    for domain, prompts in sorted(by_domain.items()):
        for number in range(each):
            words = chosen.choice(prompts)
            beginning = " ".join(words[: max(int(len(words) * chosen.uniform(*_SHARES)), _LEAST_WORDS // 2)])
            tokens = users_turn(engine.tokenizer, beginning)
            room = engine.spec.max_positions - len(tokens)
            if room > 1:
                sampling = SamplingParams(min(_MAX_TOKENS, room - 1), temperature=_TEMPERATURE, seed=number)
                yield Request(f"{domain}-{number}", tokens, sampling), beginning, domain


def users_turn(tokenizer: Tokenizer, beginning: str) -> tuple[int, ...]:
    """Tokens of a chat whose user has said `beginning` so far; of the text alone for a model without a chat template."""
    if not tokenizer.chat_template:
        return tokenizer.encode(beginning)
    before, _, _ = tokenizer.render_chat([{"role": "user", "content": _MARK}]).partition(_MARK)
    return tokenizer.encode_rendered(before + beginning)
