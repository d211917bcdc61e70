"""From a line to what the engine takes: parsed, rendered, encoded, checked against what the loaded model can hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from engine.drafters.registry import UnknownDrafterError
from engine.engine import Engine
from engine.types import Grammar, GrammarKind, Request, SamplingParams
from service.adapters.prompts import Prompt, encode_prompts
from service.domain.line import LineWork
from service.domain.request_body import GenerationRequest, LineRejected
from service.domain.requests.formats import FormatKind
from service.domain.tool_calls import ToolStyle, call_forms, tool_style

TEMPLATE_CHARACTERS = 64
"""Lines whose prompts begin alike this far were written from one pattern, as far as drafting and length statistics care."""

_KINDS = {
    FormatKind.JSON: GrammarKind.JSON_SCHEMA,
    FormatKind.JSON_SCHEMA: GrammarKind.JSON_SCHEMA,
    FormatKind.REGEX: GrammarKind.REGEX,
}
_ANY_OBJECT = '{"type": "object"}'

MAX_SCORES = 1 << 19
"""Log-probabilities in one answer. Each is some 60 bytes of JSON: a line may not bring more than the worker's memory bears."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A line for the engine: `n` requests a prompt, all with the line's id. `style`: how calls are written, if tools are offered."""

    prompts: tuple[Prompt, ...]
    requests: tuple[Request, ...]
    style: ToolStyle | None = None


def prepare(engine: Engine, line: LineWork, asked: GenerationRequest) -> Prepared:
    """Raises LineRejected where the model cannot take it: no chat template, foreign tokens, a context that is too long."""
    try:
        engine.drafters.resolve(line.drafter)
    except UnknownDrafterError as error:
        raise LineRejected(f"{error}.", param="drafter", code="unsupported_value") from None
    _check_tokens(engine, "logit_bias", [token for token, _ in asked.logit_bias])
    _check_tokens(engine, "stop_token_ids", asked.stop_token_ids)
    style = _style(engine, asked)
    grammar = grammar_of(engine, asked)
    for given in asked.prompts:
        if not isinstance(given, str):
            _check_tokens(engine, "prompt", given)
    prompts = encode_prompts(engine.tokenizer, asked)
    requests: list[Request] = []
    for number, prompt in enumerate(prompts):
        param = "messages" if asked.messages is not None else "prompt" if len(prompts) == 1 else f"prompt[{number}]"
        limit = _room(engine, asked, len(prompt.tokens), param)
        for sample in range(asked.n):
            request = Request(
                id=request_id(line.key),
                prompt_token_ids=prompt.tokens,
                sampling=_sampling(asked, limit, sample, grammar),
                template=_task(line) or _template(asked),
                priority=line.priority,
                deadline=line.deadline,
                drafter=line.drafter,
                choice=len(requests),
            )
            requests.append(request)
    _check_scores(asked, requests)
    return Prepared(prompts, tuple(requests), style)


def _check_scores(asked: GenerationRequest, requests: Sequence[Request]) -> None:
    if asked.logprobs is None:
        return
    tokens = sum(request.sampling.max_tokens + (len(request.prompt_token_ids) if asked.echo else 0) for request in requests)
    if tokens * (1 + asked.logprobs) > MAX_SCORES:
        raise LineRejected(
            f"'logprobs' of up to {tokens} tokens with {asked.logprobs} others each are more than {MAX_SCORES} numbers for one line. "
            "Lower max_tokens, n, or the number of log-probabilities.",
            param="logprobs",
            code="invalid_value",
        )


def _sampling(asked: GenerationRequest, limit: int, sample: int, grammar: Grammar | None) -> SamplingParams:
    if asked.min_tokens > limit:
        raise LineRejected(
            f"Invalid 'min_tokens': {asked.min_tokens}; there is room for {limit} tokens.", param="min_tokens", code="invalid_value"
        )
    return SamplingParams(
        max_tokens=limit,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        seed=asked.seed,
        stop=asked.stop,
        stop_token_ids=asked.stop_token_ids,
        ignore_eos=asked.ignore_eos,
        sample=sample,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        logit_bias=asked.logit_bias,
        min_tokens=asked.min_tokens,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.echo and asked.logprobs is not None,
        grammar=grammar,
    )


def format_param(asked: GenerationRequest) -> str:
    """The parameter that says what the answer looks like."""
    return asked.answer_format.param if asked.answer_format is not None else "tool_choice"


def grammar_of(engine: Engine, asked: GenerationRequest) -> Grammar | None:
    """What holds the answer to a form: `response_format`, `guided_regex`, or a `tool_choice` that asks for a call.

    Raises LineRejected where this model cannot be held to any.
    """
    grammar = None
    if asked.answer_format is not None:
        grammar = Grammar(_KINDS[asked.answer_format.kind], asked.answer_format.text or _ANY_OBJECT)
    elif asked.must_call:
        style = _style(engine, asked)
        calls = None if style is None else call_forms(style, asked.tools, asked.tool_choice)
        if calls is None:
            raise LineRejected(
                'This model marks its calls with a token that no form can ask for. Allowed: "none", "auto".',
                param="tool_choice",
                code="unsupported_value",
            )
        grammar = Grammar(GrammarKind.CALLS, json.dumps(calls, ensure_ascii=False))
    if grammar is not None and not engine.spec.eos_token_ids:
        param = format_param(asked)
        raise LineRejected(f"'{param}' is not supported: this model has no end token.", param=param, code="unsupported_value")
    return grammar


def _style(engine: Engine, asked: GenerationRequest) -> ToolStyle | None:
    if not asked.template_tools:
        return None
    style = tool_style(engine.tokenizer.chat_template)
    if style is None:
        raise LineRejected(
            'This model\'s chat template does not know tools. Allowed: no tools, or tool_choice "none".',
            param="tools",
            code="unsupported_value",
        )
    return style


def _check_tokens(engine: Engine, param: str, tokens: Sequence[int]) -> None:
    largest = engine.spec.vocab_size - 1
    if (highest := max(tokens, default=0)) > largest:
        raise LineRejected(f"Invalid '{param}': token {highest}; this model's are 0 to {largest}.", param=param, code="invalid_value")


def _room(engine: Engine, asked: GenerationRequest, prompt_tokens: int, param: str) -> int:
    """How many tokens the answer may have: what was asked for, else what is left. Raises LineRejected where that does not fit.

    Where only the prompt is scored, one token is generated all the same, for nobody.
    """
    if prompt_tokens == 0:
        raise LineRejected(f"Invalid '{param}': it has no tokens.", param=param, code="invalid_value")
    limit = context_of(engine)
    why = "this model's maximum context length" if limit == engine.spec.max_positions else "what this worker's KV cache holds"
    wanted = max(asked.max_tokens, 1) if asked.max_tokens is not None else 1
    if prompt_tokens + wanted > limit:
        raise LineRejected(
            f"{limit} tokens are {why}; you asked for {prompt_tokens + wanted}: {prompt_tokens} in '{param}' and {wanted} for the answer. "
            f"Shorten '{param}'{' or lower max_tokens' if asked.max_tokens else ''}.",
            param=param if prompt_tokens >= limit or asked.max_tokens is None else "max_tokens",
            code="context_length_exceeded",
        )
    return wanted if asked.max_tokens is not None else limit - prompt_tokens


def context_of(engine: Engine) -> int:
    """Tokens that a prompt and its answer may have together: what the model knows, or what the KV cache holds."""
    return min(engine.spec.max_positions, (engine.limits.num_blocks - 1) * engine.config.block_size)


def _task(line: LineWork) -> str | None:
    """Of the line's own metadata, else of its batch's."""
    return (line.body.get("metadata") or {}).get("task") or line.task


def _template(asked: GenerationRequest) -> str:
    start = asked.messages[0].content if asked.messages else asked.prompts[0]
    return hashlib.blake2b(repr(start[:TEMPLATE_CHARACTERS] if start else "").encode(), digest_size=8).hexdigest()


def request_id(key: tuple[str, int]) -> str:
    return f"{key[0]}:{key[1]}"
