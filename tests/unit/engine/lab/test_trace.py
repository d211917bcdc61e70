"""A live run records a trace; what it says is true, and a replay does step for step what the engine did."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.lab.machine import CurveMachine, RecordedMachine
from engine.lab.replay import Policy, UnknownPolicyError, replay, scripts
from engine.lab.trace import EngineRecord, StepRecord, Trace, TraceError, read_trace
from engine.types import FinishReason
from tests.unit.engine.hash_model import HashModel
from tests.unit.engine.test_engine import collect, engine, jobs


def record(tmp_path, count=20, loop=3, **config) -> tuple[Trace, dict]:
    path = tmp_path / "trace.jsonl"
    running = engine(trace=path, loop=loop, **config)
    results = collect(running, jobs(count))
    return read_trace(path), results


def test_a_trace_holds_the_job_and_every_step(tmp_path):
    trace, results = record(tmp_path, drafter="suffix", fixed_drafts=3)
    assert trace.engine.max_sequences == 8
    assert trace.engine.fixed_drafts == 3
    assert {tokens for tokens, *_ in trace.engine.profile} >= {1, 2, 4, 8, 16, 32}
    assert any(pairs > kv for _, _, kv, pairs, _ in trace.engine.profile)
    answers = {request.number: trace.ends[request.number].output for request in trace.requests}
    assert sorted(answers.values()) == sorted(result.token_ids for result in results.values())
    assert trace.generated == sum(result.ledger.generated for result in results.values())
    assert sum(sum(step.drafted) for step in trace.steps) == sum(result.ledger.drafted for result in results.values()) > 0
    assert sum(sum(step.accepted) for step in trace.steps) == sum(result.ledger.accepted for result in results.values()) > 0
    assert all(len(row) == count for step in trace.steps for row, count in zip(step.survival, step.drafted, strict=True))
    for step in trace.steps:
        assert {row for _, rows in step.groups for row in rows} >= {row for row, count in enumerate(step.drafted) if count}
        assert sum(seconds for *_, seconds in step.passes) == pytest.approx(step.draft_seconds)
    assert all(later.at >= step.at + step.seconds for step, later in zip(trace.steps, trace.steps[1:], strict=False))
    assert 0 < sum(step.seconds + step.draft_seconds for step in trace.steps) <= trace.seconds
    assert trace.model_error() is not None


@pytest.mark.parametrize(
    "settings", [{"drafter": "off"}, {"drafter": "suffix", "fixed_drafts": 4}, {"drafter": "ngram", "fixed_drafts": 2}]
)
@pytest.mark.parametrize("blocks", [1000, 40])
def test_a_replay_of_the_recorded_policy_takes_the_same_steps(tmp_path, settings, blocks):
    """These policies ask no cost model, so nothing depends on time, and every number must agree; also where the cache is small."""
    trace, results = record(tmp_path, blocks=blocks, **settings)
    again = replay(trace, Policy.of("recorded", trace))
    assert again.steps == len(trace.steps)
    assert again.step_tokens == sum(step.tokens for step in trace.steps)
    assert again.generated == trace.generated
    assert again.verified == sum(sum(step.chosen) for step in trace.steps)
    assert again.accepted == sum(sum(step.accepted) for step in trace.steps)
    assert again.preemptions == sum(step.preempted for step in trace.steps)
    assert again.cached == sum(result.ledger.cached for result in results.values())


def test_a_trace_of_plain_decoding_predicts_speculation(tmp_path):
    """On repetitive text and a flat curve drafts pay, and the replay says so of a run that never drafted."""
    trace, _ = record(tmp_path, drafter="off")
    machine = CurveMachine({1: 0.02, 64: 0.021})
    plain, fixed, auto = (replay(trace, Policy.of(name, trace), machine=machine) for name in ("plain", "fixed-8", "auto"))
    assert plain.verified == 0
    assert fixed.accepted > 0
    assert fixed.tokens_per_second > 1.3 * plain.tokens_per_second
    assert auto.tokens_per_second > 1.3 * plain.tokens_per_second


def test_another_batch_size_is_replayed(tmp_path):
    trace, _ = record(tmp_path, drafter="off")
    machine = CurveMachine({1: 0.02, 64: 0.021})
    small = replay(trace, Policy.of("plain", trace), max_sequences=2, machine=machine)
    assert small.generated == trace.generated
    assert small.seconds > 2 * replay(trace, Policy.of("plain", trace), machine=machine).seconds


def test_a_recorded_machine_is_fitted_to_the_steps():
    """From steps of a known machine: step time by the formula, host time by its line, drafting time a sequence."""
    curve = CurveMachine({1: 0.02, 8: 0.03, 64: 0.15}, seconds_per_kv_token=1e-6)
    trace = Trace(engine_record())
    at = 0.0
    for number in range(400):
        size = 1 + number * 7 % 60
        step = StepRecord(at, size, size, size * 50, size * 50, size, size, 0.0, 0.002 * size, None)
        seconds = curve.step(step.load)
        trace.steps.append(replace(step, seconds=seconds))
        at += seconds + step.draft_seconds + 0.001 + 0.0001 * size + (5.0 if number == 50 else 0.0)
    machine = RecordedMachine(trace)
    for step in trace.steps[::23]:
        assert machine.step(step.load) == pytest.approx(step.seconds, rel=0.01)
    assert machine.overhead(30) == pytest.approx(0.004, rel=0.02)


def test_slow_steps_count_in_the_sum():
    """Every tenth step lost its core: the shape of the curve comes from the others, the total from all."""
    trace = Trace(engine_record())
    for number in range(200):
        seconds = 0.02 * (5 if number % 10 == 0 else 1)
        trace.steps.append(StepRecord(float(number), 8, 8, 80, 80, 8, 8, seconds, 0.0, None))
    machine = RecordedMachine(trace)
    assert sum(machine.step(step.load) for step in trace.steps) == pytest.approx(sum(step.seconds for step in trace.steps))


def test_requests_that_were_awaited_arrive_when_they_did(tmp_path):
    path = tmp_path / "trace.jsonl"
    running = engine(trace=path, drafter="off")
    first, second = jobs(2)

    def source():
        yield first
        yield None
        yield None
        yield second

    list(running.run(source()))
    trace = read_trace(path)
    assert [request.awaited for request in trace.requests] == [False, True]
    early, late = scripts(trace)
    assert early.arrival == 0.0
    assert late.arrival == pytest.approx(trace.requests[1].at - trace.steps[0].at)


def test_failed_requests_are_left_out(tmp_path):
    path = tmp_path / "trace.jsonl"
    running = engine(trace=path, model=HashModel(poison=11), drafter="off")
    results = collect(running, jobs(20))
    failed = [result for result in results.values() if result.finish_reason is FinishReason.ERROR]
    trace = read_trace(path)
    assert failed
    assert len(trace.answered()) == 20 - len(failed)
    assert replay(trace, Policy.of("plain", trace)).generated == sum(len(result.token_ids) for result in results.values())


def test_what_is_not_a_trace_is_refused(tmp_path):
    trace, _ = record(tmp_path, count=3, drafter="off")
    path = tmp_path / "trace.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    cases = {
        "line 2": [lines[0], "nonsense\n"],
        "empty": [],
        "line 1": lines[1:],
        "no record of a drafter": [lines[0].replace('"experience":{}', '"experience":{"neural":"{}"}')],
        "another version": [lines[0].replace('"trace":3', '"trace":9')],
    }
    for word, content in cases.items():
        path.write_text("".join(content))
        with pytest.raises(TraceError, match=word):
            read_trace(path)
    path.write_text("".join(lines)[:-20])
    assert len(read_trace(path).steps) == len(trace.steps), "a run that was killed leaves a trace to its last whole line"


def test_policies_are_named(tmp_path):
    trace, _ = record(tmp_path, count=2, drafter="ngram")
    assert Policy.of("auto", trace) == Policy("auto", "ngram")
    assert Policy.of("fixed-12", trace) == Policy("fixed-12", "ngram", 12)
    for name in ("fixed-0", "fixed", "best"):
        with pytest.raises(UnknownPolicyError, match="plain, auto, fixed-K"):
            Policy.of(name, trace)


def engine_record() -> EngineRecord:
    return EngineRecord(
        model="m",
        device="cpu",
        max_sequences=8,
        max_step_tokens=64,
        num_blocks=100,
        block_size=4,
        max_positions=256,
        look_ahead=4,
        share_prefixes=True,
        drafter="off",
        members=("suffix",),
        max_draft_tokens=16,
        fixed_drafts=None,
    )
