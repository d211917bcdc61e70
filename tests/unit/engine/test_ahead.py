"""Steps launched before the ones before them are read: the same answers, and the same accounts but for the step too many."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import engine as engine_module
from engine.drafters import registry
from engine.engine import Engine
from engine.types import FinishReason, Request, Result, SamplingParams
from tests.unit.engine.hash_model import EOS, HashModel, Letters, continuation
from tests.unit.engine.late import GraphsOnCpu, Queue, graphs, late  # noqa: F401 - fixtures
from tests.unit.engine.test_engine import Oracle, assert_conserved, collect, engine, jobs
from tests.unit.engine.test_grammar_exactness import FORM, engine_on, loaded, reference  # noqa: F401 - fixtures
from tests.unit.engine.test_grammar_exactness import requests as form_requests
from tests.unit.engine.test_memory import Tight


def late_engine(made: list[Queue], **fields) -> Engine:
    found = engine(**fields)
    made[-1].live = True
    return found


def assert_accounts(made: Engine, results: dict[str, Result]) -> None:
    stats = made.stats()
    for result in results.values():
        assert_conserved(result.ledger)
    assert sum(r.ledger.prefill_ns + r.ledger.decode_ns + r.ledger.draft_ns for r in results.values()) == stats.busy_ns
    assert stats.generated == sum(r.ledger.generated for r in results.values())
    assert (stats.running, stats.waiting, stats.kv_blocks_held, stats.finished) == (0, 0, 0, len(results))
    made._pool.check()


@pytest.mark.parametrize("max_sequences", [1, 8, 64])
@pytest.mark.parametrize("drafter", ["off", "suffix"])
def test_a_device_that_is_behind_gives_the_same_answers(late: list[Queue], drafter: str, max_sequences: int) -> None:  # noqa: F811
    made = late_engine(late, max_sequences=max_sequences, drafter=drafter, loop=5)
    requests = jobs(24)
    results = collect(made, requests)
    for request in requests:
        assert results[request.id].token_ids == continuation(request.prompt_token_ids, request.sampling.max_tokens, 5)
        assert results[request.id].ledger.dropped == 0, "where the length ends an answer the host knows it beforehand"
    assert_accounts(made, results)
    if drafter == "off":
        assert late[-1].deepest == 2, "one step was computed while the next was waiting"


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("drafter", ["off", "auto"])
@pytest.mark.parametrize("loop", [5])
def test_captured_steps_give_the_same_answers(drafter: str, loop: int) -> None:
    made = engine(loop, drafter=drafter)
    requests = jobs(10)
    results = collect(made, requests)
    for request in requests:
        assert results[request.id].token_ids == continuation(request.prompt_token_ids, request.sampling.max_tokens, loop)
    assert_accounts(made, results)


def _ends(limit: int):
    """A model that ends every answer once its text adds up to a multiple of five."""

    class Ending(HashModel):
        def forward(self, batch, kv):
            output = super().forward(batch, kv)
            output.logits[output.logits.argmax(1) % 5 == 0, EOS] = 9.0
            return output

    return Ending(max_positions=limit)


def test_what_ends_by_itself_runs_one_step_too_many_and_pays_for_it(late: list[Queue]) -> None:  # noqa: F811
    requests = jobs(40, ignore_eos=False, max_tokens=60)
    made = late_engine(late, model=_ends(256), drafter="off")
    results = collect(made, requests)
    assert_accounts(made, results)
    reasons = {result.finish_reason for result in results.values()}
    assert FinishReason.STOP in reasons
    for result in results.values():
        assert result.ledger.dropped == (result.finish_reason is FinishReason.STOP and result.ledger.generated < 60)


def test_end_tokens_end_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = jobs(40, ignore_eos=False, max_tokens=60)
    plain = collect(engine(model=_ends(256), drafter="off"), requests)
    with monkeypatch.context() as patched:
        patched.setattr(engine_module, "make_runner", GraphsOnCpu)
        ahead = collect(engine(model=_ends(256), drafter="off"), requests)
    for name, result in plain.items():
        assert (ahead[name].token_ids, ahead[name].text, ahead[name].finish_reason) == (result.token_ids, result.text, result.finish_reason)


def test_stop_strings_cut_where_they_should(late: list[Queue]) -> None:  # noqa: F811
    answer = Letters().decode(list(continuation((1, 2, 3), 40)))
    stop = answer[17:19]
    made = late_engine(late)
    results = collect(made, [Request("x", (1, 2, 3), SamplingParams(max_tokens=40, temperature=0.0, stop=(stop,)))])
    assert results["x"].text == answer[: answer.index(stop)]
    assert len(results["x"].token_ids) == answer.index(stop) + 2
    assert_accounts(made, results)


@pytest.mark.parametrize("sampling", [{"temperature": 1.0, "seed": 7}, {"temperature": 0.8, "top_p": 0.9, "top_k": 9, "seed": 7}])
def test_seeded_text_is_the_same(late: list[Queue], monkeypatch: pytest.MonkeyPatch, sampling: dict) -> None:  # noqa: F811
    requests = jobs(16, **sampling)
    ahead = collect(late_engine(late, drafter="off"), requests)
    monkeypatch.undo()
    plain = collect(engine(drafter="off", seed=99), requests)
    assert {name: result.token_ids for name, result in ahead.items()} == {name: result.token_ids for name, result in plain.items()}


def test_preemption_starts_again_from_the_whole_text(late: list[Queue]) -> None:  # noqa: F811
    made = late_engine(late, blocks=40, drafter="off")
    requests = jobs(24)
    results = collect(made, requests)
    assert made.stats().preemptions > 0
    for request in requests:
        assert results[request.id].token_ids == continuation(request.prompt_token_ids, request.sampling.max_tokens)
    assert_accounts(made, results)


def test_aborts_while_steps_are_in_flight(late: list[Queue]) -> None:  # noqa: F811
    made = late_engine(late, max_sequences=4)
    requests = jobs(12, max_tokens=50)
    results: dict[str, Result] = {}
    rng = random.Random(1)
    for result in made.run(iter([*requests, Request("last", (1, 2), SamplingParams(max_tokens=1, temperature=0.0))])):
        results[result.id] = result
        made.abort([str(rng.randrange(12))])
    assert len(results) == 13
    assert FinishReason.ABORTED in {result.finish_reason for result in results.values()}
    for request in requests:
        if results[request.id].finish_reason is FinishReason.LENGTH:
            assert results[request.id].token_ids == continuation(request.prompt_token_ids, 50)
    assert sum(r.ledger.prefill_ns + r.ledger.decode_ns + r.ledger.draft_ns for r in results.values()) == made.stats().busy_ns
    made._pool.check()
    assert made._pool.num_held == 0


def test_a_run_that_is_closed_with_steps_in_flight_leaves_a_sound_cache(late: list[Queue]) -> None:  # noqa: F811
    made = late_engine(late, drafter="off")
    running = made.run(iter(jobs(30, max_tokens=8)))
    next(running)
    running.close()
    assert made._pool.num_held == 0
    requests = jobs(30)  # they find prefixes that the closed run left
    results = collect(made, requests)
    for request in requests:
        assert results[request.id].token_ids == continuation(request.prompt_token_ids, request.sampling.max_tokens)
    assert sum(result.ledger.cached for result in results.values()) > 0


def test_logits_that_are_not_numbers_fail_one_request(late: list[Queue]) -> None:  # noqa: F811
    made = late_engine(late, model=HashModel(poison=42), share_prefixes=False, drafter="off")
    fine = Request("fine", (1, 2), SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    results = collect(made, [Request("poisoned", (1, 42), SamplingParams(max_tokens=5, temperature=0.0)), fine])
    assert "NaN" in (results["poisoned"].error or "")
    assert results["fine"].finish_reason is FinishReason.LENGTH or 42 in continuation((1, 2), 20)


@pytest.mark.usefixtures("graphs")
def test_rules_and_log_probabilities_are_those_of_a_host_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [
        replace(request, sampling=replace(request.sampling, **rule))
        for request, rule in zip(
            jobs(24),
            [{}, {"frequency_penalty": 1.9}, {"repetition_penalty": 9.0}, {"logit_bias": ((7, 6.0),)}, {"logprobs": 2}, {}] * 4,
            strict=True,
        )
    ]
    ahead = collect(engine(5, drafter="off"), mixed)
    monkeypatch.undo()
    plain = collect(engine(5, drafter="off"), mixed)
    for name, result in plain.items():
        assert ahead[name].token_ids == result.token_ids
        assert [entry.token_id for entry in ahead[name].logprobs] == [entry.token_id for entry in result.logprobs]
        assert [entry.logprob for entry in ahead[name].logprobs] == pytest.approx([entry.logprob for entry in result.logprobs])


def test_answers_of_a_given_form_are_the_same_beside_free_ones(
    loaded: object,  # noqa: F811
    fixed_costs: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = form_requests(1, grammar=FORM, temperature=0.0)
    made += [replace(request, id=f"free {request.id}", sampling=SamplingParams(30, temperature=0.0)) for request in made]
    plain = collect(engine_on(loaded, drafter="suffix"), made)
    monkeypatch.setattr(engine_module, "make_runner", GraphsOnCpu)
    ahead = collect(engine_on(loaded, drafter="suffix"), made)
    assert {name: result.token_ids for name, result in ahead.items()} == {name: result.token_ids for name, result in plain.items()}
    for result in ahead.values():
        assert_conserved(result.ledger)


@pytest.mark.usefixtures("graphs")
def test_memory_that_comes_and_goes_leaves_the_text_alone() -> None:
    model = Tight()
    made = engine(model=model, max_step_tokens=48, blocks=60, drafter="off")
    model.most, model.luck = 12, random.Random(3)
    requests = jobs(40)
    results = collect(made, requests)
    for request in requests:
        assert results[request.id].token_ids == continuation(request.prompt_token_ids, request.sampling.max_tokens)
    made._pool.check()


@pytest.mark.usefixtures("graphs")
def test_a_drafter_gets_hidden_states_of_every_confirmed_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TEXT_DRAFTERS, "oracle", Oracle)
    made = engine(drafter="oracle", max_draft_tokens=8, share_prefixes=False)
    requests = jobs(12)
    results = collect(made, requests)
    for request in requests:
        assert results[request.id].token_ids == continuation(request.prompt_token_ids, request.sampling.max_tokens)
    assert_accounts(made, results)


def test_drafts_and_steps_ahead_take_turns(late: list[Queue], fixed_costs: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Where no draft pays nobody waits for the text; where some do, everybody is drafted for, with the text as it is."""
    from engine.speculation.planner import Planner

    asked = 0

    def limits(self: Planner, weights: np.ndarray, cost: object, most: int) -> np.ndarray:
        nonlocal asked
        asked += 1
        return np.full(len(weights), 0 if asked // 7 % 2 == 0 else min(most, 16))

    monkeypatch.setattr(Planner, "limits", limits)
    made = late_engine(late, loop=5, drafter="suffix")
    requests = jobs(24)
    results = collect(made, requests)
    for request in requests:
        assert results[request.id].token_ids == continuation(request.prompt_token_ids, request.sampling.max_tokens, 5)
    assert made.stats().accepted > 0
    assert late[-1].deepest == 2
    assert_accounts(made, results)


def test_rejected_drafts_are_resampled_on_the_device_as_on_the_host() -> None:
    """`DeviceJudge` and `HostJudge` on the same rows: greedy, seeded, stochastic, cut, with random drafts and certain ones."""
    from engine.speculation.judge import DeviceJudge, HostJudge
    from engine.speculation.verify import NO_DRAFT, Rows

    rng = np.random.default_rng()
    counts = np.array([1, 0, 5, 3, 1, 0, 8, 2])
    size, vocab = int(counts.sum()), 300
    drafts = rng.integers(0, 4, size)
    drafts[np.cumsum(counts)[counts > 0] - 1] = NO_DRAFT
    rows = Rows(
        modes=rng.integers(0, 3, size).astype(np.int8),
        temperatures=rng.uniform(0.5, 1.5, size).astype(np.float32),
        top_ks=rng.choice([0, 3, 40], size),
        top_ps=rng.choice([1.0, 0.8], size).astype(np.float32),
        seeds=rng.integers(0, 1 << 63, size).astype(np.uint64),
        positions=rng.integers(0, 1000, size),
        drafts=drafts,
    )
    logits = 2 * torch.randn(size, vocab)
    logits[:, :4] += 4.0
    q = torch.softmax(torch.randn(size, vocab) + torch.nn.functional.pad(torch.full((4,), 5.0), (0, vocab - 4)), 1)
    slots = rng.permutation(20)[: len(counts)]
    for probabilities in (None, q):
        latest = torch.full((20,), -7)
        device = DeviceJudge(latest)(logits, rows, counts, slots, 77, probabilities).read()
        host = HostJudge()(logits, rows, counts, slots, 77, probabilities).read()
        assert device.accepted.tolist() == host.accepted.tolist()
        assert device.following.tolist() == host.following.tolist()
        assert device.finite.all()
        assert host.finite.all()
        assert latest[torch.from_numpy(slots[counts > 0])].tolist() == host.following[counts > 0].tolist()
        assert (latest == -7).sum() == 20 - (counts > 0).sum()
