"""Greedy answers equal transformers' `generate`, and seeded ones do not depend on company or drafts: real model, real job, float32.

`python -m pytest tests/acceptance/test_exactness.py --data FOLDER` with `bench_mixed.jsonl` in FOLDER. About 15 minutes on two quiet
cores; `--lines 8` looks at the first eight lines only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.checkpoints import DEFAULT_MODEL, LoadedModel, load_model
from engine.config import EngineConfig
from engine.engine import Engine
from engine.noise import Stream, exponential, keys
from engine.tokenizer import Tokenizer
from engine.types import Request, SamplingParams

TIE = 1e-4
REFERENCE_BATCH = 16
pytestmark = pytest.mark.timeout(3600)

Tokens = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Job:
    requests: list[Request]
    loaded: LoadedModel
    reference: torch.nn.Module

    def logits(self, request: Request, answer: tuple[int, ...]) -> torch.Tensor:
        """transformers' logits for what follows the first tokens of an answer: float32 [vocab]."""
        with torch.inference_mode():
            return self.reference(torch.tensor([[*request.prompt_token_ids, *answer]])).logits[0, -1]


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest) -> Job:
    path = request.config.getoption("--data") / "bench_mixed.jsonl"
    if not path.exists():
        pytest.skip(f"needs the benchmark job {path}; name its folder with --data")
    loaded = load_model(DEFAULT_MODEL, dtype="float32", device="cpu")
    tokenizer = Tokenizer(loaded.tokenizer)
    made = []
    for line in path.read_text().splitlines()[: request.config.getoption("--lines")]:
        fields = json.loads(line)
        body = fields["body"]
        params = SamplingParams(max_tokens=body["max_tokens"], temperature=0.0)
        made.append(Request(fields["custom_id"], tokenizer.encode_chat(body["messages"]), params))
    reference = AutoModelForCausalLM.from_pretrained(loaded.directory, dtype=torch.float32).eval()
    return Job(made, loaded, reference)


@pytest.fixture(scope="module")
def greedy(job: Job) -> Tokens:
    """transformers' own answers, in left-padded batches of similar length."""
    answers: Tokens = {}
    ordered = sorted(job.requests, key=lambda request: len(request.prompt_token_ids))
    end = set(job.loaded.model.spec.eos_token_ids)
    for start in range(0, len(ordered), REFERENCE_BATCH):
        batch = ordered[start : start + REFERENCE_BATCH]
        width = max(len(request.prompt_token_ids) for request in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt_token_ids) :] = torch.tensor(request.prompt_token_ids)
            mask[row, width - len(request.prompt_token_ids) :] = 1
        most = max(request.sampling.max_tokens for request in batch)
        out = job.reference.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False)[:, width:].tolist()
        for request, tokens in zip(batch, out, strict=True):
            kept = tokens[: request.sampling.max_tokens]
            ends = [place for place, token in enumerate(kept) if token in end]
            answers[request.id] = tuple(kept[: ends[0] + 1] if ends else kept)
    return answers


def run(job: Job, requests: list[Request], drafter: str, max_sequences: int) -> Tokens:
    engine = Engine(job.loaded, EngineConfig(drafter=drafter, max_sequences=max_sequences, kv_bytes=1 << 30))
    return {result.id: result.token_ids for result in engine.run(iter(requests))}


def ties(job: Job, got: Tokens, want: Tokens, scores: Callable[[Request, tuple[int, ...]], torch.Tensor]) -> list[str]:
    """Requests whose answers differ. Fails unless each does so first where the two best scores are a tie."""
    differing = []
    for request in job.requests:
        ours, theirs = got.get(request.id), want.get(request.id)
        if ours is None or theirs is None or ours == theirs:
            continue
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        best = scores(request, theirs[:place]).topk(2).values
        gap = float(best[0] - best[1])
        print(f"{request.id}: first differs at token {place}, the two best scores are {gap:.2e} apart")
        assert gap < TIE, f"{request.id} differs at token {place} without a tie: gap {gap}"
        differing.append(request.id)
    return differing


@pytest.mark.parametrize("max_sequences", [1, 8, 64])
@pytest.mark.parametrize("drafter", ["off", "auto"])
def test_greedy_answers_equal_generate(job: Job, greedy: Tokens, drafter: str, max_sequences: int) -> None:
    got = run(job, job.requests, drafter, max_sequences)
    assert got.keys() == greedy.keys()
    differing = ties(job, got, greedy, job.logits)
    assert len(differing) <= 2 * len(job.requests) / 64, differing


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}], ids=["plain", "nucleus"])
def test_seeded_answers_do_not_depend_on_company_or_drafts(job: Job, sampling: dict[str, float]) -> None:
    seed = 42
    requests = [replace(request, sampling=replace(request.sampling, seed=seed, **sampling)) for request in job.requests]
    together = run(job, requests, "auto", 64)

    def perturbed(request: Request, answer: tuple[int, ...]) -> torch.Tensor:
        log_probabilities = (job.logits(request, answer) / sampling["temperature"]).log_softmax(0)
        key = keys(np.array([seed], np.uint64), np.array([len(answer)]), Stream.TOKEN).view(np.int64)
        noise = exponential(torch.from_numpy(key), torch.arange(len(log_probabilities)))[0]
        return log_probabilities - noise.log()

    plain = run(job, requests, "off", 64)
    alone = run(job, requests[:8], "auto", 1)
    assert len(ties(job, plain, together, perturbed)) <= 2 * len(requests) / 64
    assert not ties(job, alone, together, perturbed)
