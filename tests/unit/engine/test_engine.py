"""The whole loop on a model whose every token depends on everything that paging, sharing and rollback could break."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.drafters import registry
from engine.drafters.base import DraftBatch, Drafts, Progress
from engine.engine import Engine
from engine.sequence import Sequence
from engine.types import FinishReason, Request, Result, SamplingParams, TokenLedger
from tests.unit.engine.hash_model import EOS, VOCAB, HashModel, Letters, Loaded, continuation

BLOCK = 4
BLOCK_BYTES = 2 * BLOCK * 4


def engine(loop: int = 0, blocks: int = 1000, model: HashModel | None = None, **fields) -> Engine:
    config = {"block_size": BLOCK, "kv_bytes": blocks * BLOCK_BYTES, "max_sequences": 8, "max_step_tokens": 64, "look_ahead": 4, "seed": 1}
    return Engine(Loaded(model or HashModel(loop=loop)), EngineConfig(**(config | fields)))


def jobs(count: int, **sampling) -> list[Request]:
    rng = random.Random(0)
    shared = [rng.randrange(60) for _ in range(40)]
    made = []
    for number in range(count):
        prompt = shared[: rng.choice([0, 8, 9, 16, 33])] + [rng.randrange(60) for _ in range(rng.randint(1, 30))]
        params = SamplingParams(**({"max_tokens": rng.randint(1, 60), "temperature": 0.0, "ignore_eos": True} | sampling))
        made.append(Request(str(number), tuple(prompt), params, template=rng.choice(["a", "b", None])))
    return made


def collect(engine: Engine, requests: list[Request]) -> dict[str, Result]:
    return {result.id: result for result in engine.run(iter(requests))}


def assert_conserved(ledger: TokenLedger) -> None:
    assert ledger.drafted == ledger.verified + ledger.pruned
    assert ledger.verified == ledger.accepted + ledger.rejected
    assert ledger.prompt == ledger.cached + ledger.prefilled
    assert ledger.sampled == ledger.generated + ledger.dropped
    assert ledger.sampled == ledger.accepted + ledger.steps
    assert min(getattr(ledger, name) for name in TokenLedger.__dataclass_fields__) >= 0


@pytest.mark.parametrize("max_sequences", [1, 8, 64])
@pytest.mark.parametrize("drafter", ["off", "ngram", "suffix", "auto"])
@pytest.mark.parametrize("loop", [0, 5])
def test_answers_equal_plain_decoding(max_sequences: int, drafter: str, loop: int) -> None:
    made = engine(loop, max_sequences=max_sequences, drafter=drafter)
    requests = jobs(24)
    results = collect(made, requests)
    for request in requests:
        result = results[request.id]
        assert result.token_ids == continuation(request.prompt_token_ids, request.sampling.max_tokens, loop)
        assert result.text == Letters().decode(list(result.token_ids))
        assert result.finish_reason is FinishReason.LENGTH
        assert result.ledger.generated == request.sampling.max_tokens
        assert_conserved(result.ledger)
    stats = made.stats()
    assert sum(r.ledger.prefill_ns + r.ledger.decode_ns + r.ledger.draft_ns for r in results.values()) == stats.busy_ns
    if drafter == "off":
        assert all(result.ledger.plain_ns == result.ledger.modelled_ns for result in results.values())
    assert stats.generated == sum(len(r.token_ids) for r in results.values())
    assert stats.kv_blocks_held == 0
    assert (stats.running, stats.waiting, stats.finished) == (0, 0, 24)


def test_lookup_shortens_a_repetitive_job(fixed_costs: None) -> None:
    made = engine(5, drafter="ngram")
    collect(made, jobs(16))
    assert made.stats().acceptance_length > 1.5
    assert made.stats().accepted > 0


@pytest.mark.parametrize("drafter", ["off", "suffix"])
def test_preemption_leaves_the_text_alone(drafter: str) -> None:
    made = engine(5, blocks=32, drafter=drafter)
    requests = jobs(24)
    results = collect(made, requests)
    assert made.stats().preemptions > 0
    assert sum(result.ledger.recomputed for result in results.values()) > 0
    for request in requests:
        assert results[request.id].token_ids == continuation(request.prompt_token_ids, request.sampling.max_tokens, 5)
        assert_conserved(results[request.id].ledger)


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0, "seed": 7}, {"temperature": 0.8, "top_p": 0.9, "seed": 7}, {"temperature": 2.0, "top_k": 5, "seed": -3}],
)
def test_seeded_text_is_the_same_alone_in_a_batch_and_with_drafts(sampling: dict) -> None:
    requests = jobs(16, **sampling)
    together = collect(engine(5, max_sequences=64, drafter="suffix"), requests)
    plain = collect(engine(5, drafter="off", seed=99), requests)
    alone = engine(5, max_sequences=1, drafter="ngram")
    for request in requests:
        assert together[request.id].token_ids == plain[request.id].token_ids
        assert collect(alone, [request])[request.id].token_ids == plain[request.id].token_ids


def test_unseeded_text_varies_between_requests_and_repeats_with_the_engine_seed() -> None:
    request = SamplingParams(max_tokens=30, temperature=3.0, ignore_eos=True)
    requests = [Request(str(number), (1, 2, 3), request) for number in range(4)]
    first, second, other = (collect(engine(drafter="off", seed=seed), requests) for seed in (1, 1, 2))
    assert len({first[r.id].token_ids for r in requests}) == 4
    assert [first[r.id].token_ids for r in requests] == [second[r.id].token_ids for r in requests]
    assert first["0"].token_ids != other["0"].token_ids


def test_sibling_prompts_are_computed_once() -> None:
    made = engine(drafter="off")
    prompt = tuple(range(41))
    results = collect(made, [Request(str(n), (*prompt, n), SamplingParams(max_tokens=1, temperature=0.0)) for n in range(8)])
    assert sum(result.ledger.prefilled for result in results.values()) == 40 + 8 * 2
    assert sum(result.ledger.cached for result in results.values()) == 7 * 40


def test_reads_no_more_than_it_can_hold() -> None:
    read = 0

    def source() -> Iterator[Request]:
        nonlocal read
        for request in jobs(200, max_tokens=10):
            read += 1
            yield request

    made = engine(max_sequences=8, look_ahead=4)
    seen = 0
    for _ in made.run(source()):
        seen += 1
        assert read <= seen + 8 + 4
    assert seen == read == 200


def test_none_keeps_running_sequences_going() -> None:
    first, second = jobs(2, max_tokens=20)
    handed_over = []

    def source() -> Iterator[Request | None]:
        yield first
        while not handed_over:
            yield None
        yield second

    made = engine()
    results = []
    for result in made.run(source()):
        handed_over.append(result.id)
        results.append(result.id)
    assert results == [first.id, second.id]


def test_aborts_end_running_and_waiting_requests() -> None:
    made = engine(max_sequences=2, look_ahead=10)
    requests = jobs(6, max_tokens=50)
    results: dict[str, Result] = {}
    running = made.run(iter([*requests, Request("last", (1, 2), SamplingParams(max_tokens=1, temperature=0.0))]))
    made.abort(["0", "1", "2", "3", "4", "5", "unknown"])
    for result in running:
        results[result.id] = result
    assert {name for name, result in results.items() if result.finish_reason is FinishReason.ABORTED} == {"0", "1", "2", "3", "4", "5"}
    assert results["last"].finish_reason is FinishReason.LENGTH
    assert results["0"].text == ""
    assert made.stats().kv_blocks_held == 0


def test_abort_from_another_thread_stops_a_long_answer() -> None:
    made = engine(model=HashModel(max_positions=10_000), blocks=5000)
    request = Request("long", (1, 2), SamplingParams(max_tokens=9000, temperature=0.0, ignore_eos=True))
    running = made.run(iter([request, Request("short", (3,), SamplingParams(max_tokens=2, temperature=0.0))]))
    assert next(running).id == "short"
    thread = threading.Thread(target=made.abort, args=(["long"],))
    thread.start()
    thread.join()
    assert next(running).finish_reason is FinishReason.ABORTED


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ((), {}, "no tokens"),
        ((1,) * 300, {}, "context is 256"),
        ((1,) * 100, {}, "KV cache holds"),
        ((1, VOCAB), {}, "vocabulary"),
        ((-1, 2), {}, "vocabulary"),
        ((1, 2), {"drafter": "medusa"}, "known are auto, off, ngram, suffix"),
    ],
)
def test_impossible_requests_fail_alone_and_say_why(prompt: tuple[int, ...], fields: dict, message: str) -> None:
    made = engine(blocks=20)
    good = Request("good", (1, 2), SamplingParams(max_tokens=3, temperature=0.0))
    results = collect(made, [Request("bad", prompt, SamplingParams(max_tokens=5), **fields), good])
    assert results["bad"].finish_reason is FinishReason.ERROR
    assert message in (results["bad"].error or "")
    assert results["good"].finish_reason is FinishReason.LENGTH


def test_an_answer_that_outgrows_the_cache_fails_with_both_sizes() -> None:
    results = collect(engine(blocks=11), [Request("endless", (1, 2, 3), SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True))])
    assert results["endless"].finish_reason is FinishReason.ERROR
    assert "41 tokens" in (results["endless"].error or "")
    assert "holds 40" in (results["endless"].error or "")


def test_logits_that_are_not_numbers_fail_one_request() -> None:
    made = engine(model=HashModel(poison=42), share_prefixes=False)
    fine = Request("fine", (1, 2), SamplingParams(max_tokens=1, temperature=0.0))
    results = collect(made, [Request("poisoned", (1, 42), SamplingParams(max_tokens=5, temperature=0.0)), fine])
    assert "NaN" in (results["poisoned"].error or "")
    assert results["fine"].finish_reason is FinishReason.LENGTH


def test_context_end_is_a_length_stop() -> None:
    request = Request("x", (1,) * 12, SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True))
    results = collect(engine(model=HashModel(max_positions=20)), [request])
    assert len(results["x"].token_ids) == 8
    assert results["x"].finish_reason is FinishReason.LENGTH


def test_stop_strings_cut_text_and_drop_what_follows() -> None:
    prompt = (1, 2, 3)
    answer = Letters().decode(list(continuation(prompt, 40)))
    stop = answer[17:19]
    params = SamplingParams(max_tokens=40, temperature=0.0, stop=(stop,))
    result = collect(engine(), [Request("x", prompt, params)])["x"]
    assert result.text == answer[: answer.index(stop)]
    assert len(result.token_ids) == answer.index(stop) + 2
    assert result.finish_reason is FinishReason.STOP


def test_end_token_is_counted_and_not_shown() -> None:
    params = SamplingParams(max_tokens=200, temperature=1.0, seed=3)
    flat = HashModel()
    flat.forward = lambda batch, kv, inner=flat.forward: _with_likely_end(inner(batch, kv))  # type: ignore[method-assign]
    result = collect(engine(model=flat), [Request("x", (1, 2), params)])["x"]
    assert result.finish_reason is FinishReason.STOP
    assert result.token_ids[-1] == EOS
    assert chr(48 + EOS) not in result.text
    assert len(result.text) == len(result.token_ids) - 1


def _with_likely_end(output):
    output.logits[:, EOS] = 4.0
    return output


class Oracle:
    """Drafts with given accuracy, and wants hidden states."""

    name = "oracle"
    taps = (2, 0)
    prior = np.full(8, 0.9)

    def __init__(self) -> None:
        self.seen: dict[int, list[int]] = {}

    def propose(self, batch: DraftBatch) -> Drafts:
        rows = []
        for sequence, limit in zip(batch.sequences, batch.limits, strict=True):
            tokens = list(continuation(tuple(sequence.tokens.tolist()), int(limit)))
            if batch.step % 3 == 0 and tokens:
                tokens[-1] = (tokens[-1] + 1) % 60
            rows.append((tokens, list(range(min(len(tokens), 8)))))
        return Drafts.certain(rows)

    def observe(self, progress: Progress) -> None:
        for index, chunk in enumerate(progress.chunks):
            first = int(progress.query_start[index])
            rows = progress.taps[2][first : first + int(progress.valid[index])]
            self.seen.setdefault(chunk.sequence.serial, []).extend((rows[:, 0] - 2).int().tolist())

    def finish(self, sequence: Sequence, *, complete: bool) -> None:
        assert complete
        text = sequence.tokens.tolist()
        assert self.seen.pop(sequence.serial) == text[: sequence.num_computed or len(text) - 1][: len(text) - 1]


def test_a_drafter_gets_hidden_states_of_every_confirmed_token_once(fixed_costs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TEXT_DRAFTERS, "oracle", Oracle)
    made = engine(drafter="oracle", max_draft_tokens=8, share_prefixes=False)
    requests = jobs(12)
    results = collect(made, requests)
    for request in requests:
        assert results[request.id].token_ids == continuation(request.prompt_token_ids, request.sampling.max_tokens)
        assert_conserved(results[request.id].ledger)
    assert made.stats().accepted > 0
    assert made.stats().verified > made.stats().accepted


def test_one_run_at_a_time_and_a_closed_run_frees_everything() -> None:
    made = engine()
    running = made.run(iter(jobs(10)))
    next(running)
    with pytest.raises(RuntimeError, match="already running"):
        next(made.run(iter([])))
    running.close()
    assert made._pool.num_held == 0
    assert len(collect(made, jobs(3))) == 3


def test_unknown_default_drafter_is_refused_at_once() -> None:
    with pytest.raises(registry.UnknownDrafterError, match="known are"):
        engine(drafter="medusa")


@pytest.mark.parametrize("field", ["kv_bytes", "block_size", "max_sequences", "max_draft_tokens", "threads"])
def test_impossible_settings_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        EngineConfig(**{field: 0})


def test_a_budget_below_one_block_is_refused() -> None:
    with pytest.raises(ValueError, match="too small"):
        engine(blocks=1)
