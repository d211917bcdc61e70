"""Exactness: what comes out of draft-and-verify has the target's distribution, and wrong rules are caught by the same tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.noise import Stream, keys, uniform
from engine.sampling import Distribution, draw
from engine.speculation import verify as module
from engine.speculation.verify import NO_DRAFT, Mode, Rows, accepted_lengths, stochastic, verify

P = torch.tensor([0.42, 0.30, 0.18, 0.07, 0.03])
Q = torch.tensor([0.10, 0.45, 0.15, 0.20, 0.10])
TRIALS = 60_000
CRITICAL = 23.5
"""Chi-square of 4 degrees of freedom at p = 1e-4. A distribution off by a total variation of 0.02 exceeds it with TRIALS draws:
the least it can add is about TRIALS * 4 * 0.02^2 = 96."""

Rule = Callable[[Distribution, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def rows(count: int, mode: Mode, drafts: np.ndarray, **fields: np.ndarray) -> Rows:
    values = {
        "modes": np.full(count, mode, np.int8),
        "temperatures": np.ones(count, np.float32),
        "top_ks": np.zeros(count, np.int64),
        "top_ps": np.ones(count, np.float32),
        "seeds": np.arange(count, dtype=np.uint64),
        "positions": np.arange(count) % 17,
        "drafts": drafts.astype(np.int64),
    }
    return Rows(**(values | fields))


def chi_square(tokens: np.ndarray, p: torch.Tensor = P) -> float:
    expected = len(tokens) * p.double().numpy()
    counts = np.bincount(tokens, minlength=len(expected))
    return float(((counts - expected) ** 2 / expected).sum())


def drafted(q: torch.Tensor) -> np.ndarray:
    draft_keys = keys(np.arange(TRIALS, dtype=np.uint64), np.arange(TRIALS) % 17, Stream.DRAFT)
    return draw(q.expand(TRIALS, -1), None, torch.from_numpy(draft_keys.view(np.int64))).numpy()


def outcome(drafts: np.ndarray, q: torch.Tensor | None, mode: Mode = Mode.STOCHASTIC) -> np.ndarray:
    logits = P.log().expand(TRIALS, -1)
    full_q = None if q is None else q.expand(TRIALS, -1)
    verdict = verify(logits, rows(TRIALS, mode, drafts), 1, full_q)
    return np.where(verdict.stands, drafts, verdict.tokens)


def by_rule(rule: Rule, drafts: np.ndarray, q: torch.Tensor | None) -> np.ndarray:
    seeds, positions = np.arange(TRIALS, dtype=np.uint64), np.arange(TRIALS) % 17
    uniforms = torch.from_numpy(uniform(keys(seeds, positions, Stream.ACCEPT)))
    row_keys = torch.from_numpy(keys(seeds, positions, Stream.RESAMPLE).view(np.int64))
    full_q = None if q is None else q.expand(TRIALS, -1)
    tokens, stands = rule(Distribution(P.expand(TRIALS, -1)), torch.from_numpy(drafts), full_q, uniforms, row_keys)
    return torch.where(stands, torch.from_numpy(drafts), tokens).numpy()


def test_without_drafts_tokens_follow_the_target() -> None:
    assert chi_square(outcome(np.full(TRIALS, NO_DRAFT), None)) < CRITICAL


@pytest.mark.parametrize("token", range(5))
def test_certain_drafts_leave_the_target_distribution(token: int) -> None:
    assert chi_square(outcome(np.full(TRIALS, token), None)) < CRITICAL


def test_sampled_drafts_leave_the_target_distribution() -> None:
    drafts = drafted(Q)
    assert chi_square(drafts, Q) < CRITICAL
    assert chi_square(outcome(drafts, Q)) < CRITICAL


def test_acceptance_is_as_likely_as_the_distributions_overlap() -> None:
    verdict = verify(P.log().expand(TRIALS, -1), rows(TRIALS, Mode.STOCHASTIC, drafted(Q)), 1, Q.expand(TRIALS, -1))
    assert verdict.stands.mean() == pytest.approx(float(torch.minimum(P, Q).sum()), abs=0.008)  # 4 standard deviations


def no_residual(distribution, drafts, q, uniforms, row_keys):
    _, stands = stochastic(distribution, drafts, q, uniforms, row_keys)
    return draw(distribution.probabilities, None, row_keys), stands


def uniform_q(distribution, drafts, q, uniforms, row_keys):
    return stochastic(distribution, drafts, torch.full_like(q, 0.2), uniforms, row_keys)


def slightly_wrong_q(distribution, drafts, q, uniforms, row_keys):
    return stochastic(distribution, drafts, torch.stack((q[:, 0] + 0.06, q[:, 1] - 0.06, *q.T[2:]), 1), uniforms, row_keys)


def accept_more(distribution, drafts, q, uniforms, row_keys):
    return stochastic(distribution, drafts, q, uniforms * 0.9, row_keys)


def shared_noise(distribution, drafts, q, uniforms, row_keys):
    seeds, positions = np.arange(TRIALS, dtype=np.uint64), np.arange(TRIALS) % 17
    return stochastic(distribution, drafts, q, uniforms, torch.from_numpy(keys(seeds, positions, Stream.DRAFT).view(np.int64)))


@pytest.mark.parametrize("mutant", [no_residual, uniform_q, slightly_wrong_q, accept_more, shared_noise])
def test_wrong_rules_fail_the_same_test(mutant: Rule) -> None:
    drafts = drafted(Q)
    assert chi_square(by_rule(stochastic, drafts, Q)) < CRITICAL
    assert chi_square(by_rule(mutant, drafts, Q)) > CRITICAL


def test_an_error_of_two_percent_in_total_variation_is_seen() -> None:
    wrong = P + torch.tensor([0.02, -0.02, 0.0, 0.0, 0.0])
    tokens = draw(
        wrong.expand(TRIALS, -1),
        None,
        torch.from_numpy(keys(np.arange(TRIALS, dtype=np.uint64), np.zeros(TRIALS, np.int64), Stream.TOKEN).view(np.int64)),
    )
    assert chi_square(tokens.numpy()) > CRITICAL


def test_a_certain_draft_without_its_residual_fails() -> None:
    drafts = np.full(TRIALS, 1)
    assert chi_square(by_rule(no_residual, drafts, None)) > CRITICAL


@pytest.mark.parametrize("fields", [{}, {"top_ks": np.full(TRIALS, 3)}, {"top_ps": np.full(TRIALS, 0.85, np.float32)}])
def test_seeded_tokens_do_not_depend_on_what_was_drafted(fields: dict[str, np.ndarray]) -> None:
    logits = P.log().expand(TRIALS, -1)
    plain = verify(logits, rows(TRIALS, Mode.SEEDED, np.full(TRIALS, NO_DRAFT), **fields), 1).tokens
    drafts = drafted(Q)
    speculative = verify(logits, rows(TRIALS, Mode.SEEDED, drafts, **fields), 99, Q.expand(TRIALS, -1))
    assert np.array_equal(np.where(speculative.stands, drafts, speculative.tokens), plain)
    assert np.array_equal(speculative.stands, drafts == plain)
    if not fields:
        assert chi_square(plain) < CRITICAL


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(3, 1.0, 3), (0, 0.75, 3), (4, 0.5, 2)])
def test_cut_off_tokens_never_stand_and_never_come_out(top_k: int, top_p: float, kept: int) -> None:
    fields = {"top_ks": np.full(TRIALS, top_k), "top_ps": np.full(TRIALS, top_p, np.float32)}
    drafts = drafted(Q)
    verdict = verify(P.log().expand(TRIALS, -1), rows(TRIALS, Mode.STOCHASTIC, drafts, **fields), 1, Q.expand(TRIALS, -1))
    tokens = np.where(verdict.stands, drafts, verdict.tokens)
    assert tokens.max() == kept - 1
    target = P[:kept] / P[:kept].sum()
    assert chi_square(tokens, target) < CRITICAL


def test_greedy_rows_take_the_argmax_in_a_mixed_batch() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 9.0], [5.0, 1.0, 1.0]])
    mixed = rows(3, Mode.GREEDY, np.array([1, 0, NO_DRAFT]), modes=np.array([Mode.GREEDY, Mode.GREEDY, Mode.SEEDED], np.int8))
    verdict = verify(logits, mixed, 1)
    assert verdict.tokens[:2].tolist() == [1, 2]
    assert verdict.stands[:2].tolist() == [True, False]


def test_rows_that_are_not_numbers_are_reported() -> None:
    logits = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [float("inf"), 0.0]])
    assert verify(logits, rows(3, Mode.GREEDY, np.full(3, NO_DRAFT)), 1).finite.tolist() == [True, False, False]


def test_accepted_lengths_are_leading_runs() -> None:
    stands = np.array([True, True, False, True, False, False, True, True])
    lengths = accepted_lengths(stands, np.array([0, 3, 3, 4, 6]), np.array([3, 1, 0, 2, 2]))
    assert lengths.tolist() == [2, 1, 0, 0, 2]


def test_a_wide_nucleus_falls_back_to_the_whole_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "narrow_width", lambda vocab, device: 2)
    fields = {"top_ps": np.full(TRIALS, 0.95, np.float32)}
    verdict = verify(P.log().expand(TRIALS, -1), rows(TRIALS, Mode.STOCHASTIC, np.full(TRIALS, NO_DRAFT), **fields), 1)
    assert chi_square(verdict.tokens, P[:4] / P[:4].sum()) < CRITICAL
