"""Every family under the engine's loop, drafts verified in blocks: the greedy answers are transformers' own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from engine import engine as engine_module
from engine.batch import TargetModel
from engine.config import EngineConfig
from engine.engine import Engine
from engine.models.fallback import wrap_model
from engine.models.families import FAMILIES
from engine.speculation.cost_model import CostModel, Load
from engine.types import Request, SamplingParams
from tests.unit.engine.hash_model import Letters
from tests.unit.engine.models.cases import FALLBACK, LEAN
from tests.unit.engine.models.tiny import make_hf, make_lean, make_spec

PROMPTS, ANSWER = 8, 12
_ON_TRANSFORMERS_CODE = ("starcoder2", "phi", "olmo", "qwen3-moe", "mixtral")
CASES = {name: case for name, case in LEAN.items() if "," not in name} | {name: FALLBACK[name] for name in _ON_TRANSFORMERS_CODE}
"""One of each family; variants of a family differ in nothing that drafting could touch."""


@dataclass
class Loaded:
    model: TargetModel
    tokenizer: Letters


def load(hf: Any) -> Loaded:
    if hf.config.model_type in FAMILIES:
        return Loaded(make_lean(hf), Letters())
    return Loaded(wrap_model(hf, lambda **shape: make_spec(hf.config, **shape)), Letters())


def requests(vocab_size: int) -> list[Request]:
    """9 to 17 tokens, all longer than any window; half of them repeat a phrase, and two share a long prefix."""
    rng = np.random.default_rng(5)
    prompts = [[int(token) for token in rng.integers(3, vocab_size, 9 + number)] for number in range(PROMPTS)]
    for prompt in prompts[::2]:
        prompt[4:] = (prompt[:4] * 4)[: len(prompt) - 4]
    prompts[7][:12] = prompts[5][:12]
    sampling = SamplingParams(max_tokens=ANSWER, temperature=0.0)
    return [Request(str(number), tuple(prompt), sampling) for number, prompt in enumerate(prompts)]


def best_continuation(hf: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> tuple[int, ...]:
    """What transformers says after the prompt and after each token of the answer; the greedy answer is the one that equals it."""
    with torch.inference_mode():
        logits = hf(input_ids=torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return tuple(logits.argmax(-1).tolist())


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def family(request: pytest.FixtureRequest) -> tuple[Any, Loaded]:
    """(transformers model, ours); two of the former, since the fallback changes the one it is given."""
    model_type, changes = CASES[request.param]
    return make_hf(model_type, **changes), load(make_hf(model_type, **changes))


@pytest.fixture(autouse=True)
def every_step_costs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that drafts always pay, however busy this machine is: what is tested here is not the planner."""
    monkeypatch.setattr(engine_module, "measure_steps", lambda *_: [(Load(1, 1, 1), 0.01), (Load(64, 1, 1), 0.01)])
    monkeypatch.setattr(CostModel, "observe", lambda *_: None)


@pytest.mark.parametrize(("max_sequences", "prompts"), [(8, PROMPTS), (1, 3)])
def test_greedy_answers_with_drafts_are_transformers_own(family: tuple[Any, Loaded], max_sequences: int, prompts: int) -> None:
    """Asked twice: a random model never repeats itself, but its finished answers draft for the second time, and stand."""
    hf, loaded = family
    config = EngineConfig(drafter="suffix", max_sequences=max_sequences, max_step_tokens=24, block_size=4, kv_bytes=4 << 20, seed=1)
    engine = Engine(loaded, config)
    made = requests(hf.config.vocab_size)[:prompts]
    for _ in range(2):
        for result in engine.run(iter(made)):
            assert result.token_ids == best_continuation(hf, made[int(result.id)].prompt_token_ids, result.token_ids), result.id
            assert len(result.token_ids) == ANSWER or result.token_ids[-1] == 2
    assert engine.stats().accepted > prompts, "drafts stood"
