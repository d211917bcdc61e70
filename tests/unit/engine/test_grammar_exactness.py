"""Answers of a given form under speculation: the text of plain decoding, its distribution, and drafts that cost nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from engine.batch import ModelSpec
from engine.config import EngineConfig
from engine.drafters import registry
from engine.engine import Engine
from engine.grammars import Compiler
from engine.grammars.constraint import GrammarConstraint
from engine.grammars.vocabulary import Vocabulary
from engine.logit_rules import LogitRules
from engine.speculation import verify
from engine.speculation.forced import ForcedDrafts
from engine.types import FinishReason, Grammar, GrammarKind, Request, SamplingParams
from tests.unit.engine.test_engine_on_llama import VOCAB, Loaded, loaded, reference
from tests.unit.engine.test_exactness import Guesser, TableModel, skip_residual

__all__ = ["loaded", "reference"]

pytestmark = pytest.mark.usefixtures("fixed_costs")

LETTERS = [*"abcdefgiklmnops", *"0123456789"]
"""No t: then nothing but the whole word can begin `true`, and every text that is begun can be ended."""
PIECES = [*LETTERS, *'{}[]":, -', '{"', '": ', '", "', '"}', "], ", "true", "false"]
END = VOCAB - 1
WORDS = Vocabulary(tuple(piece.encode() for piece in PIECES) + (b"",) * (VOCAB - len(PIECES)), (END,))
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["ab", "ac", "bad"]},
        "mass": {"type": "integer", "minimum": 0, "maximum": 99},
        "flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "deep": {"type": "object", "properties": {"code": {"type": "string", "pattern": "^[a-d]{2}-[0-9]{2}$"}}, "required": ["code"]},
    },
    "required": ["kind", "mass", "flags", "deep"],
}
FORM = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))


def encode(text: str) -> list[int]:
    """Longest pieces first; nothing for what cannot be spelled so."""
    tokens = []
    while text:
        token = max((t for t, piece in enumerate(PIECES) if text.startswith(piece)), key=lambda t: len(PIECES[t]), default=None)
        if token is None:
            return []
        tokens.append(token)
        text = text[len(PIECES[token]) :]
    return tokens


@cache
def compiler_for(vocabulary: Vocabulary) -> Compiler:
    """One for all engines of a vocabulary: each is a process that takes seconds to start."""
    return Compiler(lambda: vocabulary)


def engine_on(loaded: Loaded, **fields: object) -> Engine:
    """The tiny decoder with a vocabulary that can spell the schema, and an end token."""
    from dataclasses import replace

    made = Engine(loaded, EngineConfig(**({"kv_bytes": 8 << 20, "max_sequences": 8, "max_step_tokens": 96, "seed": 3} | fields)))
    made.spec = replace(made.spec, eos_token_ids=(END,))
    made.grammars = compiler_for(WORDS)
    made.tokenizer.encode_piece = encode
    made.tokenizer.decode = lambda tokens, **_: "".join(PIECES[token] for token in tokens if token < len(PIECES))
    return made


def requests(count: int, **sampling: object) -> list[Request]:
    rng = np.random.default_rng(4)
    return [
        Request(str(n), tuple(rng.integers(0, VOCAB, int(rng.integers(3, 40))).tolist()), SamplingParams(**({"max_tokens": 90} | sampling)))
        for n in range(count)
    ]


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"seed": 9}, {"seed": 9, "temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5}]
)
@pytest.mark.parametrize("max_sequences", [1, 8])
def test_text_is_plain_decodings_and_has_the_form(loaded: Loaded, sampling: dict, max_sequences: int) -> None:
    made = requests(2 if max_sequences == 1 else 6, grammar=FORM, **sampling)
    made += [Request(f"free {request.id}", request.prompt_token_ids, SamplingParams(max_tokens=20, **sampling)) for request in made[:2]]
    answers = {}
    for drafter in ("off", "suffix"):
        engine = engine_on(loaded, drafter=drafter, max_sequences=max_sequences)
        answers[drafter] = {result.id: result for result in engine.run(iter(made))}
        assert (engine.stats().accepted > 20) == (drafter != "off")
    texts = {drafter: {id: result.token_ids for id, result in results.items()} for drafter, results in answers.items()}
    assert texts["suffix"] == texts["off"]
    for id, result in answers["suffix"].items():
        if not id.startswith("free"):
            assert result.finish_reason is FinishReason.STOP
            assert list(json.loads(result.text)) == list(SCHEMA["properties"])
            assert result.ledger.steps < len(result.token_ids) / 2


def test_preemption_and_samples_leave_the_text_alone(loaded: Loaded) -> None:
    """Several answers to one prompt, some of a form, in a cache that is too small for all."""
    base = requests(3, grammar=FORM, seed=2)
    made = []
    for request in base:
        for sample in range(4):
            params = SamplingParams(max_tokens=90, seed=2, sample=sample, grammar=FORM if sample % 2 else None, logprobs=1)
            made.append(Request(request.id, request.prompt_token_ids, params, choice=sample))
    block = 2 * 3 * 2 * 8 * 4 * 16
    roomy, tight = engine_on(loaded, drafter="off"), engine_on(loaded, drafter="suffix", kv_bytes=12 * block, max_step_tokens=32)
    want = {(result.id, result.choice): result for result in roomy.run(iter(made))}
    got = {(result.id, result.choice): result for result in tight.run(iter(made))}
    assert tight.stats().preemptions > 0
    assert {key: result.token_ids for key, result in got.items()} == {key: result.token_ids for key, result in want.items()}
    for key, result in got.items():
        assert [entry.token_id for entry in result.logprobs] == list(result.token_ids)
        assert [entry.logprob for entry in result.logprobs] == pytest.approx([entry.logprob for entry in want[key].logprobs], abs=1e-4)


def test_a_form_that_does_not_compile_is_that_requests_error(loaded: Loaded) -> None:
    good, bad = requests(1, grammar=FORM, temperature=0.0)[0], requests(2, grammar=Grammar(GrammarKind.REGEX, "(a"), temperature=0.0)[1]
    results = {result.id: result for result in engine_on(loaded).run(iter([good, bad]))}
    assert results["0"].finish_reason is FinishReason.STOP
    assert results["1"].finish_reason is FinishReason.ERROR
    assert "parenthesis" in str(results["1"].error)


def test_a_form_that_takes_too_long_to_follow_ends_its_request_alone(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.grammars.constraint.PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr("engine.grammars.constraint.SECONDS_A_TOKEN", 0.0)
    formed, free = requests(1, grammar=FORM, temperature=0.0)[0], requests(2, temperature=0.0)[1]
    results = {result.id: result for result in engine_on(loaded).run(iter([formed, free]))}
    assert results["0"].finish_reason is FinishReason.ERROR
    assert "takes too long" in str(results["0"].error)
    assert results["1"].finish_reason is not FinishReason.ERROR


# --- distributions --------------------------------------------------------------------------------------------------------------

TABLE = torch.tensor(
    [
        [0.44, 0.25, 0.19, 0.1, 0.02],
        [0.1, 0.6, 0.05, 0.23, 0.02],
        [0.3, 0.28, 0.3, 0.1, 0.02],
        [0.15, 0.13, 0.3, 0.4, 0.02],
        [0.2, 0.2, 0.2, 0.2, 0.2],
    ]
)
GUESS = torch.tensor(
    [
        [0.3, 0.3, 0.2, 0.2, 0.0],
        [0.25, 0.35, 0.2, 0.2, 0.0],
        [0.5, 0.2, 0.1, 0.2, 0.0],
        [0.1, 0.2, 0.4, 0.3, 0.0],
        [0.25, 0.25, 0.25, 0.25, 0.0],
    ]
)
ALTERNATING = Grammar(GrammarKind.REGEX, "([abc][bcd])*")
"""After an even number of letters a, b, c or the end; else b, c, d."""
CRITICAL = 47.0
"""Chi-square of 16 degrees of freedom (8 states, of 3 or 2) is at most this but for 1 in 14,000."""


class WideGuesser(Guesser):
    guess = GUESS
    prior = np.full(6, 0.6)


class LetterModel(TableModel):
    """Four letters and an end token."""

    def __init__(self) -> None:
        super().__init__(TABLE)
        spec = self.spec
        self.spec = ModelSpec("table", "1", 1, 1, 1, 8, 5, spec.max_positions, (4,), torch.float32, torch.device("cpu"), 0)


def form_chi_square(drafter: str) -> tuple[float, Engine]:
    """Of (state, next token): the state is the last token and whether the number of letters is even. 1,200 unseeded answers of up to 24."""
    config = EngineConfig(kv_bytes=4 << 20, max_sequences=256, max_step_tokens=1024, drafter=drafter, max_draft_tokens=4, seed=5)
    made = Engine(LetterModel(), config)
    made.grammars = compiler_for(Vocabulary((b"a", b"b", b"c", b"d", b""), (4,)))
    made.tokenizer.encode_piece = lambda text: [ord(letter) - ord("a") for letter in text]
    params = SamplingParams(max_tokens=24, grammar=ALTERNATING)
    prompts = np.random.default_rng(0).integers(0, 4, (1200, 8))
    counts = np.zeros((2, 4, 5))
    for result in made.run(Request(str(n), tuple(prompt.tolist()), params) for n, prompt in enumerate(prompts)):
        last = int(prompts[int(result.id)][-1])
        for place, token in enumerate(result.token_ids):
            counts[place % 2, last, token] += 1
            last = token
    expected = np.zeros((2, 4, 5))
    for parity, allowed in enumerate(((0, 1, 2, 4), (1, 2, 3))):
        for last in range(4):
            row = TABLE[last].double().numpy()[list(allowed)]
            expected[parity, last, list(allowed)] = counts[parity, last].sum() * row / row.sum()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum()), made


@pytest.fixture
def guesser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TEXT_DRAFTERS, "guesser", WideGuesser)
    monkeypatch.setattr("engine.speculation.forced.TEXT_DRAFTERS", {"ngram": None, "suffix": None})  # it draws, as neural drafters do


@pytest.mark.parametrize("drafter", ["off", "ngram", "guesser"])
def test_sampling_within_a_form_has_the_forms_distribution(guesser: None, drafter: str) -> None:
    found, made = form_chi_square(drafter)
    assert found < CRITICAL
    assert (made.stats().accepted > 1000) == (drafter != "off")


def cut_before(self: ForcedDrafts, proposal: object) -> None:
    """The mutant: a random draft that may not come is left out, and what comes in its place is drawn as if it had not been there."""
    for rows, _ in proposal.probabilities:
        for row in rows.tolist():
            legal = self._constraints[row].legal(self._sequences[row].output, proposal.tokens(row))
            proposal.chosen[row] = min(proposal.chosen[row], legal)


def masked_once(self: LogitRules, output: np.ndarray, drafts: np.ndarray) -> np.ndarray:
    """The mutant: every row of a verification block has the first row's mask."""
    return np.repeat(FOLLOWED(self, output, drafts[:0]), len(drafts) + 1, axis=0)


FOLLOWED = GrammarConstraint.masks


@pytest.mark.parametrize(("where", "what", "mutant"), [(ForcedDrafts, "trim", cut_before), (verify, "stochastic", skip_residual)])
def test_wrong_drafting_within_a_form_is_caught(
    guesser: None, monkeypatch: pytest.MonkeyPatch, where: object, what: str, mutant: Callable
) -> None:
    monkeypatch.setattr(where, what, mutant)
    found, _ = form_chi_square("guesser")
    assert found > CRITICAL


def test_one_mask_for_a_whole_block_is_caught(guesser: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrammarConstraint, "masks", masked_once)
    with pytest.raises(RuntimeError, match="whose grammar forbids it"):
        form_chi_square("guesser")
