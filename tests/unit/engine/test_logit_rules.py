"""Rules on logits, row by row, against their definition written out and against transformers' processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from engine.logit_rules import Edits, SequenceRules, allow, edit
from engine.types import SamplingParams

VOCAB = 70
ENDS = (0, 9)


def written_out(logits: torch.Tensor, sampling: SamplingParams, prompt: list[int], output: list[int]) -> torch.Tensor:
    row = logits.clone()
    for token, bias in sampling.logit_bias:
        row[token] += bias
    for token in {*prompt, *output}:
        factor = sampling.repetition_penalty
        row[token] = row[token] * factor if row[token] < 0 else row[token] / factor
    for token in set(output):
        row[token] -= sampling.frequency_penalty * output.count(token) + sampling.presence_penalty
    if len(output) < sampling.min_tokens:
        row[list(ENDS)] = -torch.inf
    return row


CASES = [
    {"presence_penalty": 0.7},
    {"frequency_penalty": -0.4, "repetition_penalty": 1.3},
    {"logit_bias": ((3, -100.0), (9, 2.5)), "min_tokens": 21},
    {
        "presence_penalty": -1.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 0.8,
        "logit_bias": tuple((t, t / 7) for t in range(66)),
        "min_tokens": 5,
    },
]


@pytest.mark.parametrize("fields", CASES)
def test_every_row_is_changed_as_if_the_drafts_before_it_had_been_accepted(fields: dict) -> None:
    rng = np.random.default_rng(1)
    sampling = SamplingParams(max_tokens=200, **fields)
    prompt = rng.integers(0, 30, 20)
    rules = SequenceRules(sampling, prompt, ENDS, None)
    output = np.empty(0, np.int64)
    for step in range(12):
        drafts = rng.integers(0, VOCAB if step > 6 else 12, step % 4)
        logits = torch.from_numpy(rng.normal(0, 2, (len(drafts) + 3, VOCAB)).astype(np.float32))
        found = logits.clone()
        edit(found, rules.edits(output, drafts, 2))
        assert torch.equal(found[:2], logits[:2])
        for row in range(len(drafts) + 1):
            want = written_out(logits[row + 2], sampling, prompt.tolist(), [*output.tolist(), *drafts[:row].tolist()])
            torch.testing.assert_close(found[row + 2], want)
        stood = rng.integers(0, len(drafts) + 1)
        output = np.concatenate((output, drafts[:stood], rng.integers(0, VOCAB, 1)))


def test_the_same_numbers_as_transformers_processors() -> None:
    rng = np.random.default_rng(2)
    prompt, output = rng.integers(0, VOCAB, 12), rng.integers(0, VOCAB, 6)
    sampling = SamplingParams(max_tokens=200, repetition_penalty=1.7, logit_bias=((4, 1.25), (5, -3.0)), min_tokens=7)
    logits = torch.from_numpy(rng.normal(0, 2, (1, VOCAB)).astype(np.float32))
    found = logits.clone()
    edit(found, SequenceRules(sampling, prompt, ENDS, None).edits(output, np.empty(0, np.int64), 0))
    text = torch.from_numpy(np.concatenate((prompt, output)))[None]
    want = SequenceBiasLogitsProcessor({(4,): 1.25, (5,): -3.0})(text, logits)
    want = RepetitionPenaltyLogitsProcessor(1.7)(text, want)
    want = MinNewTokensLengthLogitsProcessor(12, 7, list(ENDS), device="cpu")(text, want)
    assert torch.equal(found, want)


def test_rows_with_few_and_with_many_allowed_tokens_are_treated_alike() -> None:
    rng = np.random.default_rng(4)
    vocab, rows = 5000, np.array([0, 2, 3, 5, 6])
    allowed = rng.random((5, vocab)) < np.array([0.0, 0.002, 0.01, 0.5, 0.999])[:, None]
    allowed[1, [0, 31, 32, vocab - 1]] = True
    masks = np.packbits(np.pad(allowed, ((0, 0), (0, -vocab % 32))), axis=1, bitorder="little").view(np.int32)
    masks[1, -1] |= np.int32(-(2**31))  # past the vocabulary
    logits = torch.from_numpy(rng.normal(0, 2, (8, vocab)).astype(np.float32))
    found = logits.clone()
    allow(found, rows, masks)
    for row in range(8):
        want = logits[row] if row not in rows else logits[row].masked_fill(torch.from_numpy(~allowed[rows.tolist().index(row)]), -torch.inf)
        assert torch.equal(found[row], want)


def test_masks_leave_the_allowed_tokens_of_their_rows_alone() -> None:
    rng = np.random.default_rng(3)
    allowed = rng.random((2, VOCAB)) < 0.4
    words = np.zeros((2, 96), np.bool_)
    words[:, :VOCAB] = allowed
    packed = np.packbits(words, axis=1, bitorder="little").view("<i4").astype(np.int32)
    logits = torch.randn(4, VOCAB)
    found = logits.clone()
    allow(found, np.array([3, 1]), packed)
    assert torch.equal(found[[0, 2]], logits[[0, 2]])
    expected = logits[[3, 1]].masked_fill(~torch.from_numpy(allowed), -torch.inf)
    assert torch.equal(found[[3, 1]], expected)


def test_every_pair_is_edited_once() -> None:
    sampling = SamplingParams(max_tokens=9, repetition_penalty=1.1, logit_bias=((0, 1.0),), min_tokens=2)
    edits: Edits = SequenceRules(sampling, np.array([0, 9, 9, 3]), ENDS, None).edits(np.array([9, 0]), np.array([3, 50, 50]), 0)
    pairs = set(zip(edits.rows.tolist(), edits.tokens.tolist(), strict=True))
    assert len(pairs) == len(edits.rows)


@pytest.mark.parametrize("fields", [{"repetition_penalty": 0.0}, {"repetition_penalty": -1.0}, {"min_tokens": 10}, {"min_tokens": -1}])
def test_impossible_parameters_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        SamplingParams(max_tokens=9, **fields)
