"""From a line to what the engine takes: parsed, rendered, encoded, checked against what the loaded model can hold."""

from __future__ import annotations

import hashlib

from engine.drafters.registry import UnknownDrafterError
from engine.engine import Engine
from engine.types import Request, SamplingParams
from service.domain.line import LineWork
from service.domain.request_body import GenerationRequest, LineRejected

TEMPLATE_CHARACTERS = 64
"""Lines whose prompts begin alike this far were written from one pattern, as far as drafting and length statistics care."""


def build_request(engine: Engine, line: LineWork, asked: GenerationRequest) -> Request:
    """Raises LineRejected where the model cannot take it: no chat template, foreign tokens, a context that is too long."""
    prompt = _encode(engine, asked)
    sampling = SamplingParams(
        max_tokens=_room(engine, asked, len(prompt)),
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        seed=asked.seed,
        stop=asked.stop,
    )
    try:
        engine.drafters.resolve(line.drafter)
    except UnknownDrafterError as error:
        raise LineRejected(f"{error}.", param="drafter", code="unsupported_value") from None
    return Request(
        id=request_id(line.key),
        prompt_token_ids=prompt,
        sampling=sampling,
        template=line.template or _template(asked),
        priority=line.priority,
        deadline=line.deadline,
        drafter=line.drafter,
    )


def _encode(engine: Engine, asked: GenerationRequest) -> tuple[int, ...]:
    tokenizer = engine.tokenizer
    if asked.messages is not None:
        try:
            return tokenizer.encode_chat(asked.template_input)
        except Exception as error:  # noqa: BLE001 - a chat template is a program that came with the model; it may raise anything
            raise LineRejected(
                f"The model's chat template refuses these messages: {error}", param="messages", code="invalid_value"
            ) from None
    if isinstance(asked.prompt, tuple):
        largest = engine.spec.vocab_size - 1
        if (highest := max(asked.prompt)) > largest:
            raise LineRejected(f"Invalid 'prompt': token {highest}; this model's are 0 to {largest}.", param="prompt", code="invalid_value")
        return asked.prompt
    assert asked.prompt is not None
    return tokenizer.encode(asked.prompt)


def _room(engine: Engine, asked: GenerationRequest, prompt_tokens: int) -> int:
    """How many tokens the answer may have: what was asked for, else what is left. Raises LineRejected where that does not fit."""
    param = "prompt" if asked.messages is None else "messages"
    if prompt_tokens == 0:
        raise LineRejected(f"Invalid '{param}': it has no tokens.", param=param, code="invalid_value")
    limit = context_of(engine)
    why = "this model's maximum context length" if limit == engine.spec.max_positions else "what this worker's KV cache holds"
    wanted = asked.max_tokens if asked.max_tokens is not None else 1
    if prompt_tokens + wanted > limit:
        raise LineRejected(
            f"{limit} tokens are {why}; you asked for {prompt_tokens + wanted}: {prompt_tokens} in '{param}' and {wanted} for the answer. "
            f"Shorten '{param}'{' or lower max_tokens' if asked.max_tokens else ''}.",
            param=param if prompt_tokens >= limit or asked.max_tokens is None else "max_tokens",
            code="context_length_exceeded",
        )
    return asked.max_tokens if asked.max_tokens is not None else limit - prompt_tokens


def context_of(engine: Engine) -> int:
    """Tokens that a prompt and its answer may have together: what the model knows, or what the KV cache holds."""
    return min(engine.spec.max_positions, (engine.limits.num_blocks - 1) * engine.config.block_size)


def _template(asked: GenerationRequest) -> str:
    start = asked.messages[0].content if asked.messages else asked.prompt
    return hashlib.blake2b(repr(start[:TEMPLATE_CHARACTERS] if start else "").encode(), digest_size=8).hexdigest()


def request_id(key: tuple[str, int]) -> str:
    return f"{key[0]}:{key[1]}"
