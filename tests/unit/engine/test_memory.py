"""When memory for a step is refused the batch shrinks and the job goes on."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap

import pytest
import torch

from engine.memory import is_exhausted
from engine.types import FinishReason
from tests.unit.engine.hash_model import HashModel, continuation
from tests.unit.engine.test_engine import collect, engine, jobs


class Tight(HashModel):
    """Has memory for `most` tokens a step, or for as many as `luck` says; fails as an accelerator's allocator does."""

    most = 10_000
    luck: random.Random | None = None

    def forward(self, batch, kv):
        most = self.luck.choice([self.most, 10_000]) if self.luck else self.most
        if len(batch.token_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore words")
        return super().forward(batch, kv)


def tight(most: int, luck: random.Random | None = None, **fields):
    model = Tight(loop=fields.pop("loop", 0))
    made = engine(model=model, **fields)
    model.most, model.luck = most, luck  # from here on: the engine measured itself before
    model.steps.clear()
    return made, model


@pytest.mark.parametrize("drafter", ["off", "suffix"])
@pytest.mark.parametrize("most", [1, 3, 9, 40])
def test_answers_are_the_same_in_whatever_fits(most, drafter):
    made, model = tight(most, drafter=drafter, loop=5)
    requests = jobs(20)
    results = collect(made, requests)
    for request in requests:
        assert results[request.id].token_ids == continuation(request.prompt_token_ids, request.sampling.max_tokens, 5)
    assert max(model.steps) <= most
    assert made.stats().preemptions > 0
    made._pool.check()
    assert made._pool.num_held == 0


def test_memory_that_comes_and_goes_leaves_the_text_alone():
    """Steps fail at random, in the middle of shared prefixes: what a failed step counted as computed must never be read."""
    made, _ = tight(12, random.Random(3), max_step_tokens=48, blocks=60)
    requests = jobs(40)
    results = collect(made, requests)
    for request in requests:
        assert results[request.id].token_ids == continuation(request.prompt_token_ids, request.sampling.max_tokens)
    made._pool.check()


def test_steps_grow_again_once_memory_is_back():
    made, model = tight(4, drafter="off")
    results = collect(made, jobs(4))
    assert max(model.steps) <= 4
    model.most = 10_000
    model.steps.clear()
    results = collect(made, jobs(150))
    assert len(results) == 150
    assert max(model.steps) == 64, "as many as was asked for"


def test_a_request_that_does_not_fit_alone_fails_and_the_engine_lives_on():
    made, model = tight(0, drafter="off")
    results = collect(made, jobs(3))
    assert {result.finish_reason for result in results.values()} == {FinishReason.ERROR}
    assert all("not enough memory" in result.error and "more words" not in result.error for result in results.values())
    model.most = 10_000
    assert {result.finish_reason for result in collect(made, jobs(3)).values()} == {FinishReason.LENGTH}


def test_other_errors_are_not_taken_for_memory():
    assert is_exhausted(MemoryError())
    assert is_exhausted(
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
    )
    assert not is_exhausted(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_exhausted(ValueError("out of memory"))


REAL = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, LlamaForCausalLM
from engine.checkpoints import load_model
from engine.config import EngineConfig
from engine.engine import Engine
from engine.types import Request, SamplingParams
from tests.tiny_model import make_tiny_model

folder = make_tiny_model(Path(sys.argv[1]))
config = AutoConfig.from_pretrained(folder)
config.hidden_size, config.head_dim, config.num_hidden_layers, config.max_position_embeddings = 2048, 512, 1, 4096
LlamaForCausalLM(config).save_pretrained(folder)
loaded = load_model(str(folder), dtype="float32", device="cpu")
sampling = SamplingParams(4, temperature=0.0, ignore_eos=True)
requests = [Request(str(n), tuple(5 + (n * 7 + p) % 200 for p in range(500)), sampling) for n in range(8)]
sizes = dict(kv_bytes=64 << 20, max_step_tokens=4096, drafter="off")

def answers(engine):
    return {result.id: result.token_ids for result in engine.run(iter(requests))}

expected = answers(Engine(loaded, EngineConfig(**{**sizes, "max_step_tokens": 128})))
engine = Engine(loaded, EngineConfig(**sizes))
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (150 << 20), resource.RLIM_INFINITY))
found = answers(engine)
print(found == expected, len(found), engine.stats().preemptions, engine._scheduler.max_step_tokens)
"""


def test_a_real_allocation_that_the_system_refuses(tmp_path):
    """4,000 prompt tokens in a step are 33 MB at every place where hidden states, queries or keys stand; the process may take 150."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REAL), str(tmp_path / "model")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    same, count, preempted, tokens = done.stdout.split()[-4:]
    assert (same, count) == ("True", "8")
    assert int(preempted) > 0
    assert int(tokens) < 4096
