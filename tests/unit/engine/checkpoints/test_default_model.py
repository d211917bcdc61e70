"""The packaged default model: real weights, against transformers on the same folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.checkpoints import LoadedModel, load_model
from tests.unit.engine.models.tiny import Texts, reference, run_steps, worst_gap

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def loaded(default_model_dir: Path) -> LoadedModel:
    return load_model(str(default_model_dir), dtype="float32", device="cpu")


def test_facts(loaded: LoadedModel) -> None:
    spec = loaded.model.spec
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.hidden_size) == (30, 3, 64, 576)
    assert (spec.vocab_size, spec.max_positions) == (49152, 8192)
    assert loaded.tokenizer.convert_ids_to_tokens(list(spec.eos_token_ids)) == ["<|im_end|>"]
    assert spec.parameter_bytes == 4 * 134_515_008


def test_tokenizer_is_smollms(loaded: LoadedModel) -> None:
    """Ids as the model's publisher gives them; digits one by one, no token added around."""
    tokenizer = loaded.tokenizer
    assert tokenizer("12345 hello").input_ids == [33, 34, 35, 36, 37, 33662]
    assert tokenizer("<|im_start|><|im_end|><|endoftext|>").input_ids == [1, 2, 0]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    text = "x  =\t3.14;\n\n  caf\u00e9 \u4f60\u597d \U0001f600 don't"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == PROMPT


def test_logits_equal_transformers_and_the_answer_is_right(loaded: LoadedModel, default_model_dir: Path) -> None:
    hf = AutoModelForCausalLM.from_pretrained(default_model_dir, dtype=torch.float32)
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        answer = hf.generate(ids, max_new_tokens=12, do_sample=False)[0]
    assert loaded.tokenizer.decode(answer[ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"
    length = len(answer)
    blocks = -(-length // 4)
    texts = Texts([answer], np.arange(1, blocks + 1, dtype=np.int32)[None])
    prompt = ids.shape[1]
    steps = [[(0, 0, prompt - 5)], [(0, prompt - 5, prompt)], *[[(0, at, at + 1)] for at in range(prompt, length)]]
    found, expected = run_steps(loaded.model, texts, steps), reference(hf, texts)
    assert worst_gap(found, expected) < 5e-4, "logits reach 40 here, so this is 1e-5 of the largest"
    assert torch.equal(found[0].argmax(-1), expected[0].argmax(-1))
