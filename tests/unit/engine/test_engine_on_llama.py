"""The loop on a real decoder: a tiny Llama with random weights, against transformers, and against itself in other company."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.batch import ModelSpec, TargetModel
from engine.checkpoints.loader import build_lean
from engine.config import EngineConfig
from engine.engine import Engine
from engine.types import Request, SamplingParams
from kernels import native
from tests.unit.engine.hash_model import Letters

VOCAB = 48
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


@dataclass
class Loaded:
    model: TargetModel
    tokenizer: Letters


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # logits far enough apart that rounding never decides
    return model


@pytest.fixture(scope="module")
def loaded(reference: LlamaForCausalLM) -> Loaded:
    def spec(num_kv_heads: int, head_dim: int, parameters: int) -> ModelSpec:
        cpu = torch.device("cpu")
        return ModelSpec("tiny", "1", 3, num_kv_heads, head_dim, 32, VOCAB, 512, (), torch.float32, cpu, parameters * 4)

    return Loaded(build_lean({name: tensor.clone() for name, tensor in reference.state_dict().items()}, CONFIG, spec), Letters())


def requests(count: int, **sampling: float) -> list[Request]:
    """Some share a prefix, some repeat themselves, so that sharing and drafting have work."""
    rng = random.Random(1)
    shared = [rng.randrange(VOCAB) for _ in range(40)]
    made = []
    for number in range(count):
        phrase = [rng.randrange(VOCAB) for _ in range(rng.randint(2, 6))]
        prompt = shared[: rng.choice([0, 17, 33])] + phrase * rng.randint(1, 6)
        made.append(Request(str(number), tuple(prompt), SamplingParams(**({"max_tokens": rng.randint(8, 40)} | sampling))))
    return made


def run(loaded: Loaded, made: list[Request], **fields: object) -> tuple[dict[str, tuple[int, ...]], Engine]:
    engine = Engine(loaded, EngineConfig(**({"kv_bytes": 8 << 20, "max_sequences": 64, "max_step_tokens": 96, "seed": 3} | fields)))
    return {result.id: result.token_ids for result in engine.run(iter(made))}, engine


@pytest.fixture(scope="module")
def greedy(reference: LlamaForCausalLM) -> dict[str, tuple[int, ...]]:
    answers = {}
    for request in requests(64, temperature=0.0):
        prompt = torch.tensor([request.prompt_token_ids])
        out = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.sampling.max_tokens, do_sample=False
        )
        answers[request.id] = tuple(out[0, prompt.shape[1] :].tolist())
    return answers


@pytest.mark.parametrize("max_sequences", [1, 8, 64])
@pytest.mark.parametrize("drafter", ["off", "ngram", "suffix"])
def test_greedy_answers_equal_generate(loaded: Loaded, greedy: dict[str, tuple[int, ...]], drafter: str, max_sequences: int) -> None:
    got, _ = run(loaded, requests(64, temperature=0.0), drafter=drafter, max_sequences=max_sequences)
    assert got == greedy


COMPANY: dict[str, dict[str, object]] = {
    "log-probabilities": {"temperature": 0.0, "logprobs": 2},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.2},
    "sampling": {"temperature": 1.0, "seed": 3},
}


@pytest.mark.skipif(not native.available(), reason="this processor has no compiled kernels")
@pytest.mark.parametrize("company", [None, *COMPANY])
def test_only_greedy_steps_do_without_the_other_logits(
    fixed_costs: None, loaded: Loaded, greedy: dict[str, tuple[int, ...]], company: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = highest = 0

    def forward(batch, kv, inner=loaded.model.forward):  # type: ignore[no-untyped-def]
        nonlocal whole, highest
        output = inner(batch, kv)
        assert output.peaks is None or (batch.peaks and len(output.logits) == 0)
        whole, highest = whole + (output.peaks is None), highest + (output.peaks is not None)
        return output

    monkeypatch.setattr(loaded.model, "forward", forward)
    made = requests(8, temperature=0.0)
    others = [] if company is None else [replace(request, id=f"other {request.id}") for request in requests(8, **COMPANY[company])]
    engine = Engine(loaded, EngineConfig(kv_bytes=8 << 20, max_sequences=16, max_step_tokens=96, seed=3, drafter="suffix"))
    whole = highest = 0
    got = {result.id: result.token_ids for result in engine.run(iter(made + others))}
    assert {request.id: got[request.id] for request in made} == {request.id: greedy[request.id] for request in made}
    assert (whole > 0) == (company is not None)
    assert engine.stats().verified > 0
    assert company is not None or highest == engine.stats().steps


def test_a_tiny_cache_preempts_and_changes_nothing(loaded: Loaded, greedy: dict[str, tuple[int, ...]]) -> None:
    block = 2 * 3 * 2 * 8 * 4 * 16
    got, engine = run(loaded, requests(64, temperature=0.0), kv_bytes=14 * block, max_sequences=8)
    assert got == greedy
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.3, "top_k": 7}])
def test_seeded_answers_do_not_depend_on_company_or_drafts(loaded: Loaded, sampling: dict[str, float]) -> None:
    made = requests(64, seed=11, **sampling)
    together, _ = run(loaded, made, drafter="suffix")
    plain, _ = run(loaded, made, drafter="off")
    assert together == plain
    for request in made[:6]:
        alone, _ = run(loaded, [request], drafter="ngram", max_sequences=1)
        assert alone[request.id] == together[request.id]


RULES = {
    "repetition": ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    "biased": (
        {"logit_bias": ((3, 4.0), (5, -9.0)), "repetition_penalty": 0.9},
        {"sequence_bias": {(3,): 4.0, (5,): -9.0}, "repetition_penalty": 0.9},
    ),
    "at least": ({"min_tokens": 8, "stop_token_ids": (3, 7, 11)}, {"min_new_tokens": 8, "eos_token_id": [3, 7, 11]}),
}


@pytest.mark.parametrize("rule", RULES)
def test_greedy_answers_under_rules_equal_generate_with_its_processors(
    fixed_costs: None, reference: LlamaForCausalLM, loaded: Loaded, rule: str
) -> None:
    ours, theirs = RULES[rule]
    made = requests(8, temperature=0.0, **ours)
    want = {}
    for request in made:
        prompt = torch.tensor([request.prompt_token_ids])
        limit = request.sampling.max_tokens
        out = reference.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=limit, do_sample=False, **theirs)
        want[request.id] = tuple(out[0, prompt.shape[1] :].tolist())
    for drafter, max_sequences in (("ngram", 1), ("suffix", 8)):
        got, engine = run(loaded, made, drafter=drafter, max_sequences=max_sequences)
        assert got == want
        assert engine.stats().verified > 0


def test_samples_of_one_seed_differ_and_repeat(loaded: Loaded) -> None:
    made = [requests(1, seed=11, sample=sample)[0] for sample in range(4)]
    answers = [run(loaded, [request], drafter=drafter)[0]["0"] for request in made for drafter in ("off", "suffix")]
    assert answers[::2] == answers[1::2]
    assert len(set(answers)) == 4


@pytest.mark.parametrize("drafter", ["off", "suffix"])
def test_log_probabilities_are_transformers(fixed_costs: None, reference: LlamaForCausalLM, loaded: Loaded, drafter: str) -> None:
    """Of answers and prompts, in the company of requests that want none and of rules that must not change them."""
    made = requests(8, temperature=0.7, seed=5, logprobs=3, prompt_logprobs=True, repetition_penalty=1.1)
    made += [replace(request, id=f"plain {request.id}") for request in requests(8, temperature=0.0)]
    engine = Engine(loaded, EngineConfig(kv_bytes=8 << 20, max_sequences=8, max_step_tokens=48, seed=3, drafter=drafter))
    prompts = {request.id: request.prompt_token_ids for request in made}
    for result in engine.run(iter(made)):
        if result.id.startswith("plain"):
            assert result.logprobs == result.prompt_logprobs == ()
            continue
        prompt = prompts[result.id]
        with torch.inference_mode():
            want = torch.log_softmax(reference(torch.tensor([[*prompt, *result.token_ids]])).logits[0, :-1], dim=1)
        entries = result.prompt_logprobs + result.logprobs
        assert [entry.token_id for entry in entries] == [*prompt[1:], *result.token_ids]
        for row, entry in zip(want, entries, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert [logprob for _, logprob in entry.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
            assert all(float(row[token]) == pytest.approx(logprob, abs=1e-4) for token, logprob in entry.top)
    assert drafter == "off" or engine.stats().accepted > 0


def test_preempted_prompts_are_scored_once(loaded: Loaded) -> None:
    made = requests(8, temperature=0.0, logprobs=0, prompt_logprobs=True)
    block = 2 * 3 * 2 * 8 * 4 * 16
    roomy = Engine(loaded, EngineConfig(kv_bytes=8 << 20, max_sequences=8, drafter="off"))
    tight = Engine(loaded, EngineConfig(kv_bytes=8 * block, max_sequences=8, max_step_tokens=16, drafter="off"))
    want = {result.id: result for result in roomy.run(iter(made))}
    for result in tight.run(iter(made)):
        assert [entry.token_id for entry in result.prompt_logprobs] == [entry.token_id for entry in want[result.id].prompt_logprobs]
        assert [e.logprob for e in result.logprobs] == pytest.approx([e.logprob for e in want[result.id].logprobs], abs=1e-4)
    assert tight.stats().preemptions > 0


def test_eight_samples_hold_the_prompts_blocks_once(loaded: Loaded) -> None:
    """A prompt of 20 blocks of 16 tokens: what eight answers hold beyond one answer's is their own tails."""
    prompt = tuple(random.Random(2).randrange(VOCAB) for _ in range(321))

    def held(samples: int) -> int:
        engine = Engine(loaded, EngineConfig(kv_bytes=8 << 20, max_sequences=8, max_step_tokens=96, drafter="off"))
        params = [SamplingParams(max_tokens=20, seed=1, sample=sample) for sample in range(samples)]
        made = [Request("x", prompt, sampling, choice=choice) for choice, sampling in enumerate(params)]
        results = list(engine.run(iter(made)))
        assert {result.choice for result in results} == set(range(samples))
        assert len({result.token_ids for result in results}) == samples
        assert sum(result.ledger.prefilled for result in results) == len(prompt) + (samples - 1) * (len(prompt) - 320)
        return engine.stats().kv_blocks_peak

    one, eight = held(1), held(8)
    assert (one, eight) == (22, 20 + 8 * 2)
