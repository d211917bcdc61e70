"""GGUF files become checkpoints that transformers and the engine load alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from engine.checkpoints import load_model
from engine.checkpoints.gguf_config import _llama3_scaling
from engine.checkpoints.gguf_convert import convert
from engine.checkpoints.gguf_layouts import LAYOUTS
from tests.unit.engine.checkpoints.gguf_writer import write_gguf
from tests.unit.engine.models.tiny import CHUNKED, Texts, make_hf, reference, run_steps, worst_gap

_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
_GEMMA_ROPE = {"full_attention": _ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.25],
    "long_factor": [2.0, 4.5],
}
_YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 2.0, "original_max_position_embeddings": 32}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": _ROPE}),
    "qwen2": ("qwen2", {"rope_parameters": _YARN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"rope_parameters": {**_ROPE, "rope_type": "linear", "factor": 4.0}}),
    "gemma": ("gemma", {"rope_parameters": _ROPE, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {"sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
        | {"rope_parameters": _ROPE, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 8, "query_pre_attn_scalar": 8, "num_hidden_layers": 7, "rope_parameters": _GEMMA_ROPE, "head_dim": 8},
    ),
    "phi3": ("phi3", {"sliding_window": 8, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 32, "head_dim": None}),
    "olmo2": ("olmo2", {"rope_parameters": _ROPE, "head_dim": None}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5, "logits_scaling": 2.0}
        | {"rope_parameters": _ROPE, "tie_word_embeddings": True, "head_dim": None},
    ),
    "smollm3": ("smollm3", {"rope_parameters": _ROPE, "tie_word_embeddings": True}),
}


def make(architecture: str) -> Any:
    model_type, changes = SHAPES[architecture]
    return make_hf(model_type, vocab_size=200, **changes)


def test_every_layout_has_a_case() -> None:
    assert set(SHAPES) == set(LAYOUTS)


@pytest.mark.parametrize("architecture", SHAPES)
def test_converted_weights_and_logits_are_the_originals(architecture: str, tmp_path: Path) -> None:
    hf = make(architecture)
    path = write_gguf(tmp_path / "tiny.gguf", hf, architecture)
    loaded = load_model(str(path), cache_dir=tmp_path / "cache")
    again = AutoModelForCausalLM.from_pretrained(loaded.directory, attn_implementation="eager")
    for name, tensor in hf.state_dict().items():
        assert torch.allclose(again.state_dict()[name], tensor, atol=2e-7), name
    texts = Texts.random(200)
    expected = reference(hf, texts)
    assert worst_gap(reference(again, texts), expected) < 1e-4
    assert worst_gap(run_steps(loaded.model, texts, CHUNKED), expected) < 1e-4
    assert loaded.model.spec.eos_token_ids == (2,)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_weights_are_what_transformers_reads_from_the_same_file(architecture: str, tmp_path: Path) -> None:
    """An independent reader: the test's own idea of llama.cpp's row order must not be the only one."""
    hf = make(architecture)
    path = write_gguf(tmp_path / "tiny.gguf", hf, architecture)
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=hf)["tensors"]
    convert(path, tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_half_precision_files_keep_their_type(tmp_path: Path) -> None:
    hf = make("llama").half()
    convert(write_gguf(tmp_path / "tiny.gguf", hf, "llama"), tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skip": "blk.2.ffn_up"}, "lacks model.layers.2.mlp.up_proj.weight"),
        ({"extra": True}, "does not use: blk.0.attn_mystery.weight"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' of this GGUF file is not supported"),
    ],
)
def test_what_would_not_be_exact_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", make("llama"), "llama", **change)
    with pytest.raises(ValueError, match=message):
        load_model(str(path), cache_dir=tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache" / "models").iterdir() if entry.is_dir()], "nothing half-made stays behind"


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", make("qwen3"), "starcoder2")
    with pytest.raises(ValueError, match="GGUF architecture 'starcoder2' is not supported, only llama"):
        convert(path, tmp_path)


def test_llama3_scaling_is_recognised_by_its_factors() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = AutoConfig.for_model("llama", head_dim=64, rope_parameters={**rope, "original_max_position_embeddings": 8192})
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaled = LlamaRotaryEmbedding(config).inv_freq.double().numpy()
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    found = _llama3_scaling((plain / scaled).astype(np.float32), 500000.0, 64)
    assert found == {**{name: rope[name] for name in found if name in rope}, "original_max_position_embeddings": 8192}
    with pytest.raises(ValueError, match="follows no known scaling"):
        _llama3_scaling(np.ones(32, np.float32) * 5, 500000.0, 64)


def test_byte_level_tokenizer_splits_digits_and_knows_its_specials(tmp_path: Path) -> None:
    convert(write_gguf(tmp_path / "tiny.gguf", make_hf("llama", vocab_size=260), "llama"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("12<|im_end|>").input_ids) == ["1", "2", "<|im_end|>"], "digits never merge"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert tokenizer.decode(tokenizer("a<|im_end|> \u4f60").input_ids, skip_special_tokens=True) == "a \u4f60"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"


def test_llama3s_pattern_keeps_up_to_three_digits_together(tmp_path: Path) -> None:
    convert(write_gguf(tmp_path / "tiny.gguf", make_hf("llama", vocab_size=260), "llama", pre="llama-bpe"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("12") == ["12"]
    assert tokenizer("1").input_ids[0] == tokenizer.bos_token_id, "Llama 3 begins a text with its own token"


def test_a_tokenizer_that_transformers_would_load_as_another_is_refused(tmp_path: Path) -> None:
    """transformers reads any Qwen2 folder with Qwen2's own splitting, whatever tokenizer.json says."""
    path = write_gguf(tmp_path / "tiny.gguf", make_hf("qwen2", vocab_size=260), "qwen2", pre="llama-bpe")
    with pytest.raises(ValueError, match="transformers loads another tokenizer from the converted folder"):
        convert(path, tmp_path)
