"""Rules that the verifying kernel applies, against those that change logits on a CPU; and engines that run ahead with them."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import engine as engine_module
from engine.device_rules import DeviceRules, RowRules
from engine.logit_rules import LogitRules
from engine.types import Request, SamplingParams
from kernels.reference.sampling import Verdict, accept_drafts, process
from tests.unit.engine.hash_model import HashModel
from tests.unit.engine.late import GraphsOnCpu
from tests.unit.engine.test_engine import collect, engine, jobs
from tests.unit.engine.test_memory import Tight

VOCAB, ENDS = 70, (0, 9)
RULES = [
    {},
    {"presence_penalty": 0.7},
    {"frequency_penalty": -0.4, "repetition_penalty": 1.3},
    {"logit_bias": ((3, -100.0), (9, 2.5)), "min_tokens": 9},
    {"min_tokens": 5},
    {"min_tokens": 5, "presence_penalty": -1.5, "frequency_penalty": 0.3, "repetition_penalty": 0.8, "logit_bias": ((1, 0.5), (60, 4.0))},
]


class Every:
    """Allows tokens by their remainder, another set after each token."""

    too_slow = False

    def masks(self, output: np.ndarray, drafts: np.ndarray) -> np.ndarray:
        rows = len(output) + np.arange(len(drafts) + 1)
        bits = np.zeros((len(rows), 96), np.uint8)
        bits[:, :VOCAB] = np.arange(VOCAB) % 3 != rows[:, None] % 3
        return np.packbits(bits, axis=1, bitorder="little").view("<i4").astype(np.int32)


class Told:
    """A sequence as the rules see it: the device's never has its text."""

    def __init__(self, serial: int, fields: dict, rng: np.random.Generator) -> None:
        self.serial, self.prompt_length = serial, 12
        self.request = SimpleNamespace(sampling=SamplingParams(max_tokens=99, **fields))
        self.tokens, self.output = rng.integers(0, VOCAB, 12), np.empty(0, np.int64)

    @property
    def num_generated(self) -> int:
        return len(self.output)


def work_of(sequences: list[Told], drafts: list[np.ndarray]) -> SimpleNamespace:
    counts = np.array([len(tokens) + 1 for tokens in drafts])
    chunks = [SimpleNamespace(sequence=sequence, samples=True) for sequence in sequences]
    return SimpleNamespace(chunks=chunks, drafts=drafts, step=SimpleNamespace(row_starts=np.cumsum(counts) - counts, row_counts=counts))


@torch.inference_mode()
def test_the_kernel_sees_the_logits_that_a_cpu_would_make_of_them() -> None:
    rng = np.random.default_rng()
    host, device = LogitRules(), DeviceRules(VOCAB, torch.device("cpu"))
    told = [Told(serial, fields, rng) for serial, fields in enumerate(RULES * 2)]
    constraints = [None] * len(RULES) + [Every()] * len(RULES)

    def enter(sequence: Told, constraint: Every | None) -> None:
        for book in (host, device):
            book.enter(sequence, ENDS, constraint)

    for sequence, constraint in zip(told, constraints, strict=True):
        enter(sequence, constraint)
    for step in range(14):
        if step == 7:  # lines are given back, and taken by others
            for index in range(1, len(told), 2):
                for book in (host, device):
                    book.leave(told[index])
                told[index] = Told(100 + index, RULES[index % len(RULES)], rng)
                enter(told[index], constraints[index])
        drafts = [rng.integers(0, 8, rng.integers(0, 4)) for _ in told]
        work = work_of(told, drafts)
        logits = torch.randn(int(work.step.row_counts.sum()), VOCAB) * 2
        changed = logits.clone()
        assert host.apply(changed, work) is None
        before = logits.clone()
        rules = device.apply(logits, work)
        assert isinstance(rules, RowRules)
        assert torch.equal(logits, before), "log-probabilities are of the model's own logits"
        drafted = torch.from_numpy(np.concatenate([np.append(tokens, -1) for tokens in drafts]))
        torch.testing.assert_close(process(logits, drafted, rules.biases, rules.penalties, rules.allowed), changed)
        verdict = Verdict(torch.randint(0, VOCAB, (len(logits),)), torch.rand(len(logits)) < 0.6, torch.ones(len(logits), dtype=torch.bool))
        bounds = torch.from_numpy(np.concatenate(([0], np.cumsum(work.step.row_counts))).astype(np.int32))
        accepted, following, _ = accept_drafts(verdict, bounds, rules.count(drafted)).tolist()
        for sequence, tokens, count, token in zip(told, drafts, accepted, following, strict=True):
            sequence.output = np.concatenate((sequence.output, tokens[:count], [token]))


def test_one_set_of_biases_has_one_line_however_many_share_it() -> None:
    device = DeviceRules(VOCAB, torch.device("cpu"))
    rng = np.random.default_rng(1)
    told = [Told(serial, {"min_tokens": 5, "logit_bias": ((serial % 2, 1.0),)}, rng) for serial in range(40)]
    for sequence in told:
        device.enter(sequence, ENDS)
    work = work_of(told, [np.empty(0, np.int64)] * 40)
    rules = device.apply(torch.zeros(40, VOCAB), work)
    assert rules is not None
    assert rules.biases is not None
    assert rules.penalties is None
    assert len(set(rules.biases.rows.tolist())) == 2
    assert len(rules.biases.values) == 4
    for sequence in told:
        device.leave(sequence)
    assert not device._sets
    assert device.apply(torch.zeros(40, VOCAB), work) is None


MIXED = [
    {},
    {"frequency_penalty": 1.9},
    {"repetition_penalty": 9.0, "min_tokens": 1},
    {"logit_bias": ((7, 6.0),)},
    {"logprobs": 2},
    {"logprobs": 3, "prompt_logprobs": True, "presence_penalty": 1.0},
]


def mixed_jobs(count: int, **sampling) -> list[Request]:
    from dataclasses import replace

    made = jobs(count, **sampling)
    return [replace(one, sampling=replace(one.sampling, **MIXED[index % len(MIXED)])) for index, one in enumerate(made)]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}])
@pytest.mark.parametrize("drafter", ["off", "suffix"])
def test_penalties_and_log_probabilities_need_no_token_on_the_host(
    fixed_costs: None, monkeypatch: pytest.MonkeyPatch, drafter: str, sampling: dict
) -> None:
    requests = mixed_jobs(24, **sampling)
    plain = collect(engine(5, drafter=drafter), requests)
    monkeypatch.setattr(engine_module, "make_runner", GraphsOnCpu)
    made, events = engine(5, drafter=drafter), []
    launch, book = made._launcher.launch, made._booking.book
    monkeypatch.setattr(made._launcher, "launch", lambda work, attempt: events.append("launch") or launch(work, attempt))
    monkeypatch.setattr(made._booking, "book", lambda flight: events.append("read") or book(flight))
    ahead = collect(made, requests)
    for name, result in plain.items():
        assert ahead[name].token_ids == result.token_ids
        for found, expected in ((ahead[name].logprobs, result.logprobs), (ahead[name].prompt_logprobs, result.prompt_logprobs)):
            assert [entry.token_id for entry in found] == [entry.token_id for entry in expected]
            assert [entry.logprob for entry in found] == pytest.approx([entry.logprob for entry in expected], abs=1e-5)
            assert [len(entry.top) for entry in found] == [len(entry.top) for entry in expected]
            for one, other in zip(found, expected, strict=True):
                assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-5)
    if drafter == "off":
        waits = sum(one == other == "read" for one, other in pairwise(events))
        assert waits <= 1, "the next step was launched before the last one was read, all along"


def test_the_device_counts_what_a_mutant_would_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = jobs(12, frequency_penalty=1.9, max_tokens=30)
    plain = {name: result.token_ids for name, result in collect(engine(5, drafter="off"), requests).items()}
    monkeypatch.setattr(engine_module, "make_runner", GraphsOnCpu)
    monkeypatch.setattr(RowRules, "count", lambda self, drafts: None)
    assert {name: result.token_ids for name, result in collect(engine(5, drafter="off"), requests).items()} != plain


@pytest.mark.parametrize("fields", [{"blocks": 40}, {"max_step_tokens": 48, "blocks": 60, "tight": True}])
def test_counts_survive_preemption_and_steps_that_fail(monkeypatch: pytest.MonkeyPatch, fields: dict) -> None:
    import random

    requests = mixed_jobs(30)
    plain = collect(engine(drafter="off"), requests)
    monkeypatch.setattr(engine_module, "make_runner", GraphsOnCpu)
    model = Tight() if fields.pop("tight", False) else HashModel()
    made = engine(model=model, drafter="off", **fields)
    if isinstance(model, Tight):
        model.most, model.luck = 12, random.Random(3)
    found = collect(made, requests)
    assert made.stats().preemptions > 0
    assert {name: result.token_ids for name, result in found.items()} == {name: result.token_ids for name, result in plain.items()}
