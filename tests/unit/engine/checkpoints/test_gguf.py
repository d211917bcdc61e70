"""GGUF files become checkpoints that transformers and the engine load alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from jinja2 import TemplateError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.utils.chat_template_utils import render_jinja_template

from engine.checkpoints import load_model
from engine.checkpoints.chat_formats import GEMMA, ChatFormat
from engine.checkpoints.gguf_config import _llama3_scaling
from engine.checkpoints.gguf_convert import convert
from engine.checkpoints.gguf_file import GGUFFile
from engine.checkpoints.gguf_layouts import LAYOUTS
from engine.checkpoints.gguf_tokenizer import _pre_tokenizer
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


_STEPS = {
    GGMLQuantizationType.Q4_0: 1 / 8,
    GGMLQuantizationType.Q4_1: 2 / 15 / 2,
    GGMLQuantizationType.Q8_0: 1 / 127 / 2 + 2**-11,
    GGMLQuantizationType.F16: 2**-11,
    GGMLQuantizationType.BF16: 2**-8,
}
"""Largest error of a type, relative to the largest number of the row it is in."""


@pytest.mark.parametrize("kind", _STEPS, ids=lambda kind: kind.name)
def test_stored_types_are_the_weights_up_to_their_precision(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    hf = make_hf("llama", vocab_size=200, hidden_size=64, num_attention_heads=8)
    convert(write_gguf(tmp_path / "tiny.gguf", hf, "llama", quantised=kind), tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    for name, tensor in hf.state_dict().items():
        error = (found[name].float() - tensor).abs().amax(-1)
        allowed = _STEPS[kind] * tensor.abs().amax(-1) * 1.03 if tensor.dim() > 1 else torch.zeros(())
        assert (error <= allowed).all(), name


def _six_bits(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """Eight 6-bit scales and minima in 12 bytes: four of each as they are, the others' low four bits, and their high two on top."""
    low_scales, low_mins = scales[:4] | (scales[4:] >> 4) << 6, mins[:4] | (mins[4:] >> 4) << 6
    return np.concatenate([low_scales, low_mins, (scales[4:] & 15) | (mins[4:] & 15) << 4]).astype(np.uint8)


def _k_block(kind: str, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """One super-block of 256 numbers as ggml's documentation of the k-quants lays it out, and the numbers it stands for."""
    half, tiny = np.array([0.25], np.float16), np.array([0.5], np.float16)
    if kind == "Q6_K":
        q, scales = rng.integers(0, 64, (16, 16)), rng.integers(-128, 128, 16)
        flat = q.reshape(2, 4, 32)
        low = np.concatenate([flat[:, 0] & 15 | (flat[:, 2] & 15) << 4, flat[:, 1] & 15 | (flat[:, 3] & 15) << 4], axis=1)
        high = sum(flat[:, part] >> 4 << 2 * part for part in range(4))
        raw = low.astype(np.uint8).tobytes() + high.astype(np.uint8).tobytes() + scales.astype(np.int8).tobytes() + half.tobytes()
        return raw, (0.25 * scales[:, None] * (q - 32)).ravel()
    scales, mins = rng.integers(0, 64, 8), rng.integers(0, 64, 8)
    q = rng.integers(0, 32 if kind == "Q5_K" else 16, (8, 32))
    fifth = sum((q[part] >> 4) << part for part in range(8)).astype(np.uint8).tobytes() if kind == "Q5_K" else b""
    nibbles = (q[0::2] & 15 | (q[1::2] & 15) << 4).astype(np.uint8).tobytes()
    raw = half.tobytes() + tiny.tobytes() + _six_bits(scales, mins).tobytes() + fifth + nibbles
    return raw, (0.25 * scales[:, None] * q - 0.5 * mins[:, None]).ravel()


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_the_numbers_they_stand_for(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    blocks = [_k_block(kind, rng) for _ in range(6)]
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    stored = np.frombuffer(b"".join(raw for raw, _ in blocks), np.uint8).reshape(3, -1)
    writer.add_tensor("matrix", stored, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = np.concatenate([values for _, values in blocks]).reshape(3, 512)
    assert np.array_equal(GGUFFile(tmp_path / "k.gguf").tensor("matrix"), expected)


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


def test_a_given_chat_format_serves_a_file_without_a_template_and_ends_answers(tmp_path: Path) -> None:
    chat = ChatFormat("{{ bos_token }}{% for message in messages %}[{{ message.content }}]{% endfor %}", "<|endoftext|>")
    hf = make_hf("llama", vocab_size=260)
    for has_template, prompt, ends in ((False, "<|im_start|>[hello]", [2, 0]), (True, "hello", [2])):
        folder = tmp_path / str(has_template)
        folder.mkdir()
        convert(write_gguf(tmp_path / "tiny.gguf", hf, "llama", chat=has_template), folder, chat)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == prompt
        assert GenerationConfig.from_pretrained(folder).eos_token_id == ends


def test_gemmas_turns() -> None:
    def render(*turns: tuple[str, str]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return render_jinja_template([messages], chat_template=GEMMA.template, add_generation_prompt=True, bos_token="<bos>")[0][0]

    assert render(("user", " Hi ")) == "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    talk = (("system", "Be terse."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"))
    assert render(*talk) == (
        "<bos><start_of_turn>user\nBe terse.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )
    for wrong, message in (
        ((("user", "a"), ("user", "b")), "turns must alternate"),
        ((("tool", "a"),), "turns must alternate"),
        ((("user", "a"), ("system", "b")), "only the first message may be a system message"),
    ):
        with pytest.raises(TemplateError, match=message):
            render(*wrong)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("refact", "don't 123", ["don", "'t", "\u0120", "1", "2", "3"]),
        ("olmo", "don't 123", ["don", "'t", "\u0120123"]),
        ("dbrx", "DON'T 12345", ["DON", "'T", "\u0120", "123", "45"]),
        ("smaug-bpe", "x 12345", ["x", "\u0120", "123", "45"]),
        ("gpt-4o", "helloWorld's a/b", ["hello", "World's", "\u0120a", "/b"]),
        ("qwen2", "x 123", ["x", "\u0120", "1", "2", "3"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(pre: str, text: str, pieces: list[str]) -> None:
    assert [piece for piece, _ in _pre_tokenizer(pre).pre_tokenize_str(text)] == pieces
