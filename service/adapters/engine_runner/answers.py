"""From the engine's results for one line to the choices of its answer, and what they count for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from engine.tokenizer import Tokenizer
from engine.types import Result, TokenLogprob
from service.adapters.engine_runner.requests import Prepared
from service.adapters.prompts import Prompt
from service.domain.reasoning import count_thinking, split_thoughts, thinks
from service.domain.request_body import GenerationRequest
from service.domain.response_body import Choice, ScoredToken
from service.domain.tool_calls import call_id, parse_calls
from service.domain.usage import Usage


class Answers:
    """Reads results with the model's tokenizer. `results` are in the order of choices: all of a prompt's, then the next prompt's."""

    def __init__(self, tokenizer: Tokenizer, end_tokens: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._end_tokens = frozenset(end_tokens)
        self._thinks = thinks(tokenizer.chat_template)

    def choices(self, completion_id: str, asked: GenerationRequest, prepared: Prepared, results: Sequence[Result]) -> list[Choice]:
        made = []
        for index, result in enumerate(results):
            if asked.messages is None:
                made.append(self._text_choice(asked, prepared, index // asked.n, result))
            else:
                made.append(self._chat_choice(completion_id, asked, prepared, index, result))
        return made

    def usage(self, asked: GenerationRequest, prepared: Prepared, results: Sequence[Result]) -> Usage:
        """A prompt counts once, however many answers it has; of it, what was not computed for any of them was cached."""
        prompts = [results[start : start + asked.n] for start in range(0, len(results), asked.n)]
        reasoning = sum(self._thinking(prepared.prompts[0], result) for result in results) if self._thinks_in(asked) else 0
        return Usage(
            input_tokens=sum(samples[0].ledger.prompt for samples in prompts),
            cached_tokens=sum(min(result.ledger.cached for result in samples) for samples in prompts),
            output_tokens=0 if asked.max_tokens == 0 else sum(result.ledger.generated for result in results),
            reasoning_tokens=reasoning,
        )

    def _thinks_in(self, asked: GenerationRequest) -> bool:
        """An answer that is held to a form from its first token on has no room for thoughts."""
        return self._thinks and asked.messages is not None and asked.answer_format is None and not asked.must_call

    def _text_choice(self, asked: GenerationRequest, prepared: Prepared, number: int, result: Result) -> Choice:
        prompt = prepared.prompts[number]
        scoring = asked.max_tokens == 0
        text = "" if scoring else result.text
        scores = None
        if asked.logprobs is not None:
            scores = [] if scoring else self._scores(result)
            if asked.echo:
                scores = [ScoredToken(self._bytes(prompt.tokens[0]), None), *map(self._score, result.prompt_logprobs), *scores]
        if asked.echo:
            said = asked.prompts[number]
            text = (said if isinstance(said, str) else self._tokenizer.decode(prompt.tokens)) + text
        return Choice(text, "length" if scoring else result.finish_reason.value, scores)

    def _chat_choice(self, completion_id: str, asked: GenerationRequest, prepared: Prepared, index: int, result: Result) -> Choice:
        text, reasoning, reason = result.text, None, result.finish_reason.value
        thinks = self._thinks_in(asked)
        if thinks:
            thoughts = split_thoughts(text, prepared.prompts[0].text)
            text, reasoning = thoughts.content, thoughts.reasoning or None
        calls = []
        if prepared.style is not None:
            spoken = self._tokenizer.decode(self._spoken(asked, result), special=True)
            if thinks:
                spoken = split_thoughts(spoken, prepared.prompts[0].text).content
            left, found = parse_calls(prepared.style, spoken)
            if not asked.parallel_tool_calls:
                found = found[:1]
            calls = [(call_id(prepared.style, completion_id, index, number), call) for number, call in enumerate(found)]
            if calls:
                text, reason = left, "tool_calls"
        return Choice(text, reason, None if asked.logprobs is None else self._scores(result), reasoning, calls)

    def _spoken(self, asked: GenerationRequest, result: Result) -> tuple[int, ...]:
        """The answer's tokens without the one that ended it: an end of turn is text to the parsers of calls."""
        tokens = result.token_ids
        ended = tokens and (tokens[-1] in self._end_tokens or tokens[-1] in asked.stop_token_ids)
        return tokens[:-1] if ended else tokens

    def _thinking(self, prompt: Prompt, result: Result) -> int:
        return count_thinking(len(result.token_ids), lambda count: self._tokenizer.decode(result.token_ids[:count]), prompt.text)

    def _scores(self, result: Result) -> list[ScoredToken]:
        """Of the tokens that the text is made of: no end token, nothing from a stop string on."""
        low, high = 0, len(result.token_ids)
        while low < high:  # the fewest tokens that hold the whole text
            middle = (low + high) // 2
            enough = len(self._tokenizer.decode(result.token_ids[:middle])) >= len(result.text)
            low, high = (low, middle) if enough else (middle + 1, high)
        return [self._score(entry) for entry in result.logprobs[:low]]

    def _score(self, entry: TokenLogprob) -> ScoredToken:
        return ScoredToken(self._bytes(entry.token_id), entry.logprob, tuple((self._bytes(token), value) for token, value in entry.top))

    def _bytes(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token)
