"""A KV cache in eight bits: half the memory and more, logits near those of the model's own type."""

from __future__ import annotations

import pytest
import torch

from engine.batch import ForwardBatch
from engine.config import EngineConfig, derive_limits
from engine.engine import Engine
from engine.kv_pool import KVPool
from engine.kv_scales import calibrate, make_pool
from engine.types import Request, SamplingParams
from tests.unit.engine.hash_model import HashModel
from tests.unit.engine.hash_model import Loaded as Hashed
from tests.unit.engine.late import graphs  # noqa: F401 - a fixture
from tests.unit.engine.models.tiny import make_hf, make_lean
from tests.unit.engine.test_graphs import Loaded

BLOCK, CPU = 4, torch.device("cpu")


def pool(dtype: torch.dtype) -> KVPool:
    return KVPool(4, 12, BLOCK, 2, 8, dtype, CPU)


def batch(tokens: list[int], start: int) -> ForwardBatch:
    """The last of `tokens`, from `start` on; the blocks are 3, 4, ..."""
    position = torch.arange(start, len(tokens))
    table = torch.arange(3, 11)
    one = torch.tensor([len(tokens)]).int()
    return ForwardBatch(
        torch.tensor(tokens[start:]), position, table[position // BLOCK] * BLOCK + position % BLOCK, table[None].int(),
        torch.tensor([0, len(position)]).int(), one, torch.arange(len(position)), len(position), len(tokens),
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_logits_are_near_those_of_a_wide_cache(family: str) -> None:
    model = make_lean(make_hf(family))
    tokens = torch.randint(3, 100, (25,)).tolist()
    wide, narrow = pool(torch.float32), pool(torch.float8_e4m3fn)
    calibrate(model, narrow)
    apart = []
    for start, end in ((0, 14), (14, 15), (15, 25)):
        step = batch(tokens[:end], start)
        a, b = (torch.log_softmax(model.forward(step, kv).logits, 1) for kv in (wide, narrow))
        apart.append((a - b).abs().mean() / a.std())
    assert max(apart) < 0.12, "e4m3 has three bits of mantissa: 6% a number at most"
    assert max(apart) > 1e-5, "what is stored is rounded"
    assert narrow.nbytes * 4 == wide.nbytes


def test_scales_come_from_the_models_own_keys_and_values() -> None:
    model = make_lean(make_hf("llama"))
    kv, unscaled = pool(torch.float8_e4m3fn), pool(torch.float8_e4m3fn)
    calibrate(model, kv)
    scales = torch.stack([scale for scale in (*kv.k_scales, *kv.v_scales) if scale is not None])
    assert scales.shape == (8, 2)
    assert scales.unique().numel() == 16, "one a layer and head, of keys and of values"
    step = batch(list(range(3, 28)), 0)
    model.forward(step, kv)
    stored = torch.stack([cache.float().abs() for cache in (*kv.keys, *kv.values)])
    assert 448.0 / 8 < stored.amax() <= 448.0, "the range is used, with room above"
    # Scales are part of what is stored, whatever they are: others change nothing but the rounding.
    for scale in (*unscaled.k_scales, *unscaled.v_scales):
        assert scale is not None
        scale.fill_(0.013)
    a, b = (model.forward(step, cache).logits for cache in (kv, unscaled))
    assert (a - b).abs().mean() < 0.3 * a.std()


def test_the_engine_runs_on_it_and_holds_more_tokens() -> None:
    loaded, hf = Loaded(), make_hf("llama")
    sizes = {"kv_bytes": 1 << 18, "block_size": 4, "max_sequences": 6, "drafter": "off"}
    configs = [EngineConfig(**sizes, kv_dtype=kind) for kind in ("auto", "fp8")]
    requests = [Request(str(n), tuple(range(3, 9 + n)), SamplingParams(12, temperature=0.0, ignore_eos=True)) for n in range(5)]
    wide, narrow = (Engine(loaded, config) for config in configs)
    assert narrow.limits.block_bytes * 4 == wide.limits.block_bytes
    results = {result.id: result for result in narrow.run(requests)}
    assert all(len(result.token_ids) == 12 for result in results.values())
    for request in requests:  # each token is one of the model's likeliest after the text before it
        text = list(request.prompt_token_ids) + list(results[request.id].token_ids)
        scores = torch.log_softmax(hf(input_ids=torch.tensor([text])).logits[0].float(), 1)
        chosen = scores[torch.arange(len(request.prompt_token_ids) - 1, len(text) - 1), torch.tensor(results[request.id].token_ids)]
        assert (scores.max(1).values[len(request.prompt_token_ids) - 1 : -1] - chosen).max() < 1.0


@pytest.mark.usefixtures("graphs")
def test_captured_steps_run_on_it() -> None:
    config = EngineConfig(kv_bytes=1 << 18, block_size=4, max_sequences=6, drafter="off", seed=1, kv_dtype="fp8")
    requests = [Request(str(n), tuple(range(3, 9 + n)), SamplingParams(5, temperature=0.0, ignore_eos=True)) for n in range(3)]
    ahead = {result.id: result.token_ids for result in Engine(Loaded(), config).run(requests)}
    with pytest.MonkeyPatch.context() as patched:
        from engine import engine as engine_module
        from engine.runner import Runner

        patched.setattr(engine_module, "make_runner", lambda model, kv, count: Runner(model, kv))
        assert {result.id: result.token_ids for result in Engine(Loaded(), config).run(requests)} == ahead


def test_models_that_cannot_read_it_are_refused_by_name() -> None:
    model, config = HashModel(), EngineConfig(kv_bytes=1 << 16, kv_dtype="fp8")
    with pytest.raises(ValueError, match="kv_dtype fp8: hash runs on transformers' own modules"):
        make_pool(model, config, derive_limits(config, model.spec, 1 << 30))
    with pytest.raises(ValueError, match="kv_dtype fp8"):
        Engine(Hashed(model), config)
    with pytest.raises(ValueError, match="must be auto or fp8, got 'int4'"):
        EngineConfig(kv_dtype="int4")
