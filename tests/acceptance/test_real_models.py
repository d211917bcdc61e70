"""The packaged models on their real weights: greedy answers equal transformers' `generate` on the same, dequantised, folder.

`python -m pytest tests/acceptance/test_real_models.py`. About four minutes on two cores, and the first time a download of 330 MB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.checkpoints import PACKAGED, LoadedModel, load_model
from engine.config import EngineConfig
from engine.engine import Engine
from engine.tokenizer import Tokenizer
from engine.types import Request, SamplingParams

TIE = 1e-4
ANSWER = 40
pytestmark = pytest.mark.timeout(1800)

STORY = "Anna keeps bees behind the old mill. In spring they fly to the lime trees, in summer to the heather on the hill. "
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, there was a little girl who",
    STORY * 30 + "In spring the bees fly to",  # some 800 tokens: longer than Gemma's sliding window of 512
)
CHAT = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": "Why is the sky blue?"}],
)


@dataclass(frozen=True)
class Case:
    name: str
    loaded: LoadedModel
    reference: Any
    requests: list[Request]
    bodies: list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module", params=sorted(PACKAGED))
def case(request: pytest.FixtureRequest) -> Case:
    loaded = load_model(request.param, dtype="float32", device="cpu")
    tokenizer = Tokenizer(loaded.tokenizer)
    sampling = SamplingParams(max_tokens=ANSWER, temperature=0.0)
    prompts = [tokenizer.encode(text) for text in PROMPTS] + [tokenizer.encode_chat(messages) for messages in CHAT]
    made = [Request(str(number), prompt, sampling) for number, prompt in enumerate(prompts)]
    limits = {"max_tokens": ANSWER, "temperature": 0, "model": "any"}
    bodies = [("/v1/completions", {"prompt": text, **limits}) for text in PROMPTS]
    bodies += [("/v1/chat/completions", {"messages": messages, **limits}) for messages in CHAT]
    reference = AutoModelForCausalLM.from_pretrained(loaded.directory, dtype=torch.float32).eval()
    return Case(request.param, loaded, reference, made, bodies)


@pytest.fixture(scope="module")
def generated(case: Case) -> dict[str, tuple[int, ...]]:
    answers = {}
    for request in case.requests:
        prompt = torch.tensor([request.prompt_token_ids])
        out = case.reference.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=ANSWER, do_sample=False)
        answers[request.id] = tuple(out[0, prompt.shape[1] :].tolist())
    return answers


@pytest.mark.parametrize(("drafter", "max_sequences"), [("off", 1), ("auto", 8)])
def test_greedy_answers_equal_generate(case: Case, generated: dict[str, tuple[int, ...]], drafter: str, max_sequences: int) -> None:
    engine = Engine(case.loaded, EngineConfig(drafter=drafter, max_sequences=max_sequences, kv_bytes=1 << 29))
    for result in engine.run(iter(case.requests)):
        ours, theirs = result.token_ids, generated[result.id]
        if ours != theirs:
            place = next(at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
            with torch.inference_mode():
                prompt = case.requests[int(result.id)].prompt_token_ids
                best = case.reference(torch.tensor([[*prompt, *theirs[:place]]])).logits[0, -1].topk(2).values
            assert best[0] - best[1] < TIE, f"{case.name}, prompt {result.id} differs at token {place} without a tie"


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_the_command_line_gives_the_same_texts(case: Case, generated: dict[str, tuple[int, ...]], endpoint: str, tmp_path: Path) -> None:
    job, output = tmp_path / "job.jsonl", tmp_path / "answers.jsonl"
    bodies = {str(number): body for number, (url, body) in enumerate(case.bodies) if url == endpoint}
    lines = [{"custom_id": number, "method": "POST", "url": endpoint, "body": body} for number, body in bodies.items()]
    job.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "service.cli.main", "run", str(job), "-o", str(output), "--model", case.name, "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer(case.loaded.tokenizer)
    texts = {}
    for line in output.read_text().splitlines():
        row = json.loads(line)
        choice = row["response"]["body"]["choices"][0]
        texts[row["custom_id"]] = choice["text"] if "text" in choice else choice["message"]["content"]
        print(f"{case.name} {row['custom_id']}: {texts[row['custom_id']]!r}")
    assert texts == {number: tokenizer.decode(generated[number]) for number in bodies}
