"""Each family's lean decoder against transformers on tiny random weights, and proof that each special feature matters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.models import families
from engine.models.decoder import LeanDecoder
from engine.models.families import FAMILIES
from tests.unit.engine.models.tiny import CHUNKED, LENGTHS, ONE_SHOT, Texts, make_hf, make_lean, reference, run_steps, worst_gap

TOLERANCE = 1e-4

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
}
_SLIDING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 rope": ("llama", {"rope_parameters": _LLAMA3}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    "llama, yarn rope": ("llama", {"rope_parameters": _YARN}),
    "llama, dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "layer_types": _SLIDING}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": ("gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {"sliding_window": 6, "query_pre_attn_scalar": 20, "layer_types": _SLIDING, "rope_parameters": _GEMMA3_ROPE}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {"sliding_window": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 2.0},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False}),
}


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any, Texts, list[torch.Tensor]]:
    """(transformers model, lean decoder, texts, transformers' logits)"""
    model_type, changes = CASES[request.param]
    hf = make_hf(model_type, **changes)
    texts = Texts.random(hf.config.vocab_size)
    return hf, make_lean(hf), texts, reference(hf, texts)


def test_every_family_has_a_case() -> None:
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)


def test_packed_prefill_equals_transformers(pair: tuple[Any, Any, Texts, list[torch.Tensor]]) -> None:
    _, lean, texts, expected = pair
    assert worst_gap(run_steps(lean, texts, ONE_SHOT), expected) < TOLERANCE


def test_chunks_single_tokens_and_drafts_equal_transformers(pair: tuple[Any, Any, Texts, list[torch.Tensor]]) -> None:
    _, lean, texts, expected = pair
    assert worst_gap(run_steps(lean, texts, CHUNKED), expected) < TOLERANCE


def test_taps_are_transformers_hidden_states(pair: tuple[Any, Any, Texts, list[torch.Tensor]]) -> None:
    hf, lean, texts, expected = pair
    layers = hf.config.num_hidden_layers
    step = texts.step([(0, 0, LENGTHS[0])], taps=(0, 2, layers))
    step = replace(step, logit_rows=torch.tensor([4, LENGTHS[0] - 1]))
    out = lean.forward(step, texts.pool(lean.spec))
    with torch.inference_mode():
        hidden = hf(input_ids=texts.tokens[0][None], use_cache=False, output_hidden_states=True).hidden_states
        last = hf.model.norm(out.taps[layers])
    for tap in (0, 2):
        assert torch.allclose(out.taps[tap], hidden[tap][0], atol=TOLERANCE)
    assert torch.allclose(last, hidden[-1][0], atol=TOLERANCE), "the last tap is the residual stream before the final norm"
    assert torch.allclose(out.logits, expected[0][[4, -1]], atol=TOLERANCE)


def test_rows_without_logits_are_written_too() -> None:
    """A prefill chunk may want no logits at all; its keys and values must be there for the next step."""
    hf = make_hf("llama")
    lean, texts = make_lean(hf), Texts.random(101)
    pool = texts.pool(lean.spec)
    silent = lean.forward(replace(texts.step([(0, 0, 20)]), logit_rows=torch.empty(0, dtype=torch.int64)), pool)
    spoken = lean.forward(texts.step([(0, 20, 23)]), pool)
    assert silent.logits.shape == (0, 101)
    assert torch.allclose(spoken.logits, reference(hf, texts)[0][20:], atol=TOLERANCE)


_FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2's window": ("qwen2", {"window": "none"}),
    "mistral's window": ("mistral", {"window": "none"}),
    "qwen3's norm of queries and keys": ("qwen3", {"qk_norm": "none"}),
    "gemma's offset norms": ("gemma", {"unit_offset": False}),
    "gemma's embedding scale": ("gemma", {"scaled_embedding": False}),
    "gemma2's soft caps": ("gemma2", {"soft_capped": False}),
    "gemma3's window": ("gemma3", {"window": "none"}),
    "gemma3's norm after attention": ("gemma3", {"attention_norms": ("input_layernorm", None)}),
    "gemma3's norm after the MLP": ("gemma3", {"mlp_norms": ("pre_feedforward_layernorm", None)}),
    "olmo2's norm over all heads": ("olmo2", {"qk_norm": "none"}),
    "granite's factors": ("granite", {"multipliers": False}),
}
_DROPPED = ("q_norm", "k_norm", "post_attention_layernorm", "post_feedforward_layernorm")


@pytest.mark.parametrize("feature", _FEATURES)
def test_without_its_feature_a_family_is_wrong(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, change = _FEATURES[feature]
    model_type, values = CASES[case]
    hf = make_hf(model_type, **values)
    texts = Texts.random(hf.config.vocab_size)
    monkeypatch.setitem(families.FAMILIES, model_type, replace(FAMILIES[model_type], **change))
    lean = _make_lean_ignoring(hf, _DROPPED if {"qk_norm", "attention_norms", "mlp_norms"} & change.keys() else ())
    assert worst_gap(run_steps(lean, texts, ONE_SHOT), reference(hf, texts)) > 100 * TOLERANCE


def _make_lean_ignoring(hf: Any, dropped: tuple[str, ...]) -> Any:
    """As `make_lean`, without complaint about norms that the crippled family no longer takes."""
    from engine.models import weights

    class Lenient(dict[str, torch.Tensor]):
        def __bool__(self) -> bool:
            return any(not any(part in name for part in dropped) for name in self)

    original = weights.pack_weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "pack_weights", lambda tensors, *args, **kw: original(Lenient(tensors), *args, **kw))
        return make_lean(hf)


def _with_angles(hf: Any, change: Any) -> LeanDecoder:
    lean = make_lean(hf)
    lean._ropes = change(lean._ropes)
    return lean


def _swapped(ropes: dict[str, Any]) -> dict[str, Any]:
    return {"full_attention": ropes["sliding_attention"], "sliding_attention": ropes["full_attention"]}


def _plain(ropes: dict[str, Any]) -> dict[str, Any]:
    default = 1.0 / (100.0 ** (torch.arange(0, 8, 2) / 8))
    return {name: replace(rope, inv_freq=default[: len(rope.inv_freq)], scaling=1.0) for name, rope in ropes.items()}


@pytest.mark.parametrize(
    ("case", "change"),
    [("gemma3", _swapped), ("llama, llama3 rope", _plain), ("llama, linear rope", _plain), ("llama, yarn rope", _plain), ("phi3", _plain)],
)
def test_with_other_angles_a_family_is_wrong(case: str, change: Any) -> None:
    model_type, values = CASES[case]
    hf = make_hf(model_type, **values)
    texts = Texts.random(hf.config.vocab_size)
    assert worst_gap(run_steps(_with_angles(hf, change), texts, ONE_SHOT), reference(hf, texts)) > 100 * TOLERANCE


def test_rotating_a_layer_without_rope_is_wrong() -> None:
    model_type, values = CASES["smollm3"]
    hf = make_hf(model_type, **values)
    lean, texts = make_lean(hf), Texts.random(hf.config.vocab_size)
    lean._arch = replace(lean._arch, layers=tuple(replace(layer, rope="all") for layer in lean._arch.layers))
    assert worst_gap(run_steps(lean, texts, ONE_SHOT), reference(hf, texts)) > 100 * TOLERANCE


def test_context_ends_where_longrope_would_switch() -> None:
    factors = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [4.0, 5.0, 6.0, 7.0]}
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 32, **factors}
    hf = make_hf("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    lean, texts = make_lean(hf), Texts.random(hf.config.vocab_size)
    assert lean.spec.max_positions == 32
    assert worst_gap(run_steps(lean, texts, CHUNKED), reference(hf, texts)) < TOLERANCE


def test_unknown_layer_kinds_and_activations_are_refused_by_name() -> None:
    config = make_hf("qwen3").config
    config.layer_types = ["full_attention", "chunked_attention"] * 2
    with pytest.raises(ValueError, match="layer 1 is of type 'chunked_attention'"):
        families.read_architecture(config)
    config = make_hf("llama").config
    config.hidden_act = "tanh"
    with pytest.raises(ValueError, match="activation 'tanh'"):
        families.read_architecture(config)
