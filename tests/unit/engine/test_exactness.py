"""Sampling under the live scheduler, planner and drafters, on models whose next-token distribution is a small known table.

Step times come from a fixed cost curve, so that every run takes the same decisions and the statistics are always the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.batch import ForwardBatch, ForwardOutput, ModelSpec
from engine.config import EngineConfig
from engine.drafters import registry
from engine.drafters.base import DraftBatch, Drafts, Progress
from engine.engine import Engine
from engine.logit_rules import Edits, SequenceRules
from engine.noise import Stream, keys
from engine.sampling import draw
from engine.sequence import Sequence
from engine.speculation import planner, verify
from engine.speculation.cost_model import CostModel
from engine.types import Request, SamplingParams
from tests.unit.engine.hash_model import Letters

TABLE = torch.tensor([[0.45, 0.25, 0.2, 0.1], [0.1, 0.6, 0.05, 0.25], [0.3, 0.3, 0.3, 0.1], [0.15, 0.15, 0.3, 0.4]])
GUESS = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.25, 0.35, 0.2, 0.2], [0.5, 0.2, 0.1, 0.2], [0.1, 0.2, 0.4, 0.3]])
CRITICAL = 39.1
"""Chi-square of 12 degrees of freedom (4 states of 3) at p = 1e-4."""


class TableModel:
    """The next token depends on the last one alone."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.spec = ModelSpec("table", "1", 1, 1, 1, 8, len(table), 100_000, (), torch.float32, torch.device("cpu"), 0)
        self.tokenizer = Letters()
        self.model = self

    def forward(self, batch: ForwardBatch, kv: object) -> ForwardOutput:
        return ForwardOutput(self.table[batch.token_ids[batch.logit_rows]].log())


class Guesser:
    """Samples drafts from a table of its own, with fresh noise on every attempt; `bins` tell the drafted token before apart."""

    name = "guesser"
    taps: tuple[int, ...] = ()
    prior = np.full(5, 0.6)
    guess = GUESS

    def propose(self, batch: DraftBatch) -> Drafts:
        count, width = len(batch.sequences), int(batch.limits.max(initial=0))
        tokens, bins = np.zeros((count, width), np.int64), np.full((count, width), -1, np.int64)
        probabilities = torch.zeros(count, width, self.guess.shape[1])
        seeds = np.array([sequence.serial for sequence in batch.sequences], np.uint64)
        last = torch.tensor([int(sequence.tokens[-1]) for sequence in batch.sequences])
        for column in range(width):
            positions = np.array([sequence.num_tokens + column for sequence in batch.sequences])
            row_keys = torch.from_numpy(keys(seeds, positions, Stream.DRAFT, attempt=batch.step).view(np.int64))
            probabilities[:, column] = self.guess[last]
            bins[:, column] = last.numpy() + 1 if column else 0
            last = draw(probabilities[:, column], None, row_keys)
            tokens[:, column] = last.numpy()
        bins[np.arange(width) >= batch.limits[:, None]] = -1
        return Drafts(tokens, batch.limits, bins, probabilities)

    def observe(self, progress: Progress) -> None:
        """Reads no hidden states."""

    def finish(self, sequence: Sequence, *, complete: bool) -> None:
        """Keeps nothing."""


@pytest.fixture(autouse=True)
def _guesser(fixed_costs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TEXT_DRAFTERS, "guesser", Guesser)


def transitions(drafter: str, table: torch.Tensor = TABLE, requests: int = 2000, **sampling: float) -> tuple[np.ndarray, Engine]:
    """Counts of (token, next token) over unseeded answers of 24 tokens, first tokens included: 48,000 draws."""
    config = EngineConfig(kv_bytes=4 << 20, max_sequences=256, max_step_tokens=1024, drafter=drafter, max_draft_tokens=4, seed=5)
    made = Engine(TableModel(table), config)
    params = SamplingParams(max_tokens=24, **sampling)
    counts = np.zeros((4, 4), np.int64)
    prompts = np.random.default_rng(0).integers(0, 4, (requests, 12))
    made_requests = {str(n): Request(str(n), tuple(prompt.tolist()), params) for n, prompt in enumerate(prompts)}
    for result in made.run(iter(made_requests.values())):
        text = np.array([made_requests[result.id].prompt_token_ids[-1], *result.token_ids])
        np.add.at(counts, (text[:-1], text[1:]), 1)
    return counts, made


def chi_square(counts: np.ndarray, table: torch.Tensor) -> float:
    expected = counts.sum(axis=1, keepdims=True) * table.double().numpy()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum())


@pytest.mark.parametrize("drafter", ["off", "ngram", "suffix", "guesser"])
def test_sampled_text_has_the_targets_distribution(drafter: str) -> None:
    counts, made = transitions(drafter)
    assert chi_square(counts, TABLE) < CRITICAL
    stats = made.stats()
    assert (stats.accepted > 5000) == (drafter != "off")
    assert (stats.verified > stats.accepted) == (drafter != "off")


@pytest.mark.parametrize("drafter", ["ngram", "guesser"])
def test_several_answers_to_a_prompt_some_with_scores_have_the_targets_distribution(drafter: str) -> None:
    """250 prompts, eight unseeded answers each, in one another's company; half of them want log-probabilities."""
    config = EngineConfig(kv_bytes=4 << 20, max_sequences=256, max_step_tokens=1024, drafter=drafter, max_draft_tokens=4, seed=5)
    made = Engine(TableModel(TABLE), config)
    prompts = np.random.default_rng(0).integers(0, 4, (250, 12))
    asked = [
        Request(
            str(n), tuple(prompt.tolist()), SamplingParams(max_tokens=24, sample=sample, logprobs=1 if sample % 2 else None), choice=sample
        )
        for n, prompt in enumerate(prompts)
        for sample in range(8)
    ]
    counts, texts = np.zeros((4, 4), np.int64), set()
    for result in made.run(iter(asked)):
        text = np.array([prompts[int(result.id)][-1], *result.token_ids])
        np.add.at(counts, (text[:-1], text[1:]), 1)
        texts.add(result.token_ids)
        if result.choice % 2:
            want = TABLE.double().log().numpy()[text[:-1], text[1:]]
            assert [entry.logprob for entry in result.logprobs] == pytest.approx(want.tolist(), abs=1e-4)
    assert len(texts) > 1990
    assert chi_square(counts, TABLE) < CRITICAL
    assert made.stats().accepted > 5000


@pytest.mark.parametrize("drafter", ["ngram", "guesser"])
def test_truncated_sampling_has_the_truncated_distribution(drafter: str) -> None:
    kept = TABLE.pow(1 / 0.8)
    kept[TABLE.topk(3).values[:, -1:] > TABLE] = 0.0
    counts, _ = transitions(drafter, temperature=0.8, top_k=3)
    assert chi_square(counts, kept / kept.sum(1, keepdim=True)) < CRITICAL


UNEVEN = torch.tensor([[0.46, 0.25, 0.19, 0.1], [0.11, 0.59, 0.06, 0.24], [0.29, 0.31, 0.27, 0.13], [0.14, 0.16, 0.3, 0.4]])
"""No two alike, so that what is cut off never depends on the order of equals."""
PENALTIES = {"presence_penalty": 0.8, "frequency_penalty": 0.1, "repetition_penalty": 1.3, "logit_bias": ((2, 0.5),)}
CUT = {**PENALTIES, "temperature": 0.8, "top_k": 3, "top_p": 0.9}


def penalised(last: int, output: list[int], prompt: set[int], sampling: SamplingParams) -> np.ndarray:
    """The next token's distribution, written out: rules, temperature, top-k, top-p."""
    logits = UNEVEN[last].double().log().numpy().copy()
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    for token in prompt | set(output):
        logits[token] *= sampling.repetition_penalty if logits[token] < 0 else 1 / sampling.repetition_penalty
    for token in set(output):
        logits[token] -= sampling.frequency_penalty * output.count(token) + sampling.presence_penalty
    p = np.exp(logits / sampling.temperature)
    order = np.argsort(-p)
    p[order[sampling.top_k or len(p) :]] = 0.0
    p /= p.sum()
    above = np.concatenate(([0.0], np.cumsum(p[order])[:-1]))
    p[order[above >= sampling.top_p]] = 0.0
    return p / p.sum()


def penalised_chi_square(drafter: str, **fields: object) -> tuple[float, Engine]:
    """Sums of (token drawn - its distribution) by the token before, in their own covariance: chi-square, 12 degrees of freedom.

    The distribution moves with every answer's own history, so each draw is held against its own. 1,500 answers of 12 tokens.
    """
    sampling = SamplingParams(max_tokens=12, **fields)
    config = EngineConfig(kv_bytes=4 << 20, max_sequences=256, max_step_tokens=1024, drafter=drafter, max_draft_tokens=4, seed=5)
    made = Engine(TableModel(UNEVEN), config)
    prompts = np.random.default_rng(0).integers(0, 4, (1500, 3))
    apart, spread = np.zeros((4, 4)), np.zeros((4, 4, 4))
    known: dict[tuple, np.ndarray] = {}
    for result in made.run(Request(str(n), tuple(prompt.tolist()), sampling) for n, prompt in enumerate(prompts)):
        prompt = prompts[int(result.id)].tolist()
        for place, token in enumerate(result.token_ids):
            output = list(result.token_ids[:place])
            last = output[-1] if output else prompt[-1]
            key = (last, tuple(np.bincount(output, minlength=4)), frozenset(prompt))
            p = known.get(key)
            if p is None:
                p = known[key] = penalised(last, output, set(prompt), sampling)
            assert p[token] > 0.0
            apart[last] += np.eye(4)[token] - p
            spread[last] += np.diag(p) - np.outer(p, p)
    return sum(float(apart[last] @ np.linalg.pinv(spread[last]) @ apart[last]) for last in range(4)), made


@pytest.mark.parametrize(("drafter", "fields"), [("ngram", CUT), ("guesser", CUT), ("guesser", PENALTIES)])
def test_sampling_under_penalties_has_the_penalised_distribution(drafter: str, fields: dict) -> None:
    found, made = penalised_chi_square(drafter, **fields)
    assert found < CRITICAL
    assert made.stats().accepted > 500


COUNTED = SequenceRules.edits


def ignore_drafts(self: SequenceRules, output: np.ndarray, drafts: np.ndarray, first_row: int) -> Edits:
    """Every row as if nothing had been drafted."""
    rows = [COUNTED(self, output, drafts[:0], first_row + row) for row in range(len(drafts) + 1)]
    return Edits(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))


def skip_residual(distribution, drafts, q, uniforms, row_keys):
    _, stands = EXACT(distribution, drafts, q, uniforms, row_keys)
    return draw(distribution.probabilities, distribution.ids, row_keys), stands


def wrong_q(distribution, drafts, q, uniforms, row_keys):
    return EXACT(distribution, drafts, None if q is None else torch.full_like(q, 0.25), uniforms, row_keys)


EXACT = verify.stochastic


@pytest.mark.parametrize(("drafter", "mutant"), [("ngram", skip_residual), ("guesser", skip_residual), ("guesser", wrong_q)])
def test_wrong_verification_is_caught(monkeypatch: pytest.MonkeyPatch, drafter: str, mutant: Callable) -> None:
    monkeypatch.setattr(verify, "stochastic", mutant)
    counts, _ = transitions(drafter)
    assert chi_square(counts, TABLE) > CRITICAL


@pytest.mark.parametrize(
    ("drafter", "where", "what", "mutant"),
    [
        ("guesser", SequenceRules, "edits", ignore_drafts),
        ("ngram", verify, "stochastic", skip_residual),
        ("guesser", verify, "stochastic", wrong_q),
    ],
)
def test_wrong_verification_under_penalties_is_caught(
    monkeypatch: pytest.MonkeyPatch, drafter: str, where: object, what: str, mutant: Callable
) -> None:
    monkeypatch.setattr(where, what, mutant)
    found, _ = penalised_chi_square(drafter, **PENALTIES)
    assert found > CRITICAL


def test_a_total_variation_of_two_percent_is_caught() -> None:
    wrong = TABLE + torch.tensor([0.02, -0.02, 0.0, 0.0])
    counts, _ = transitions("ngram", wrong)
    assert chi_square(counts, TABLE) > CRITICAL


def test_choosing_by_what_was_drawn_biases_random_drafts_and_a_fixed_capacity_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts after A always stand and after B never do; one draft alone does not pay, two that are likely do."""
    a, b, c, _ = range(4)
    table = torch.tensor([[0.7, 0.3, 0.0, 0.0]] * 4)
    table[a] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    table[b] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    guess = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 4)
    guess[a] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    guess[b] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    monkeypatch.setattr(Guesser, "guess", guess)
    monkeypatch.setattr(Guesser, "prior", np.array([0.8, 0.98, 0.02, 0.8, 0.8]))
    monkeypatch.setattr(CostModel, "curve", lambda self, tokens: np.where(np.asarray(tokens) > 1, 1.85, 1.0))

    def share_of_a() -> float:
        config = EngineConfig(kv_bytes=4 << 20, max_sequences=1, max_step_tokens=16, drafter="guesser", max_draft_tokens=2, seed=5)
        made = Engine(TableModel(table), config)
        [result] = made.run(iter([Request("x", (c,), SamplingParams(max_tokens=2500))]))
        assert made.stats().accepted > 200
        text = np.array(result.token_ids)
        after_c = text[1:][text[:-1] == c]
        return float((after_c == a).mean())

    assert share_of_a() == pytest.approx(0.7, abs=0.05)  # 4 standard deviations
    monkeypatch.setattr(planner.Planner, "choose", lambda self, survival, cost, *, random: planner.search(planner.Offer(survival), cost))
    assert share_of_a() > 0.76
