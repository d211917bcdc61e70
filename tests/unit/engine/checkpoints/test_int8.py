"""Weights of products in eight bits: the model is the one that transformers runs with the same rounded weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.checkpoints import load_model
from engine.config import EngineConfig
from engine.engine import Engine
from engine.types import Request, SamplingParams
from kernels.reference.linear import quantise
from tests.tiny_model import make_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "tiny")


def test_answers_are_those_of_the_rounded_weights(folder: Path) -> None:
    rounded = AutoModelForCausalLM.from_pretrained(folder)
    rounded.lm_head.weight = torch.nn.Parameter(
        rounded.lm_head.weight.detach().clone()
    )  # the head is rounded, its twin the embedding is not
    with torch.no_grad():
        for name, module in rounded.named_modules():
            if isinstance(module, torch.nn.Linear):
                numbers, scales = quantise(module.weight)
                assert 0.0 < (numbers * scales[:, None] - module.weight).abs().max() < 0.01 * module.weight.abs().max(), name
                module.weight.copy_(numbers * scales[:, None])
    loaded = load_model(str(folder), dtype="int8")
    assert loaded.model.spec.precision == "float32+int8-weights"
    prompts = [tuple(range(5, 5 + length)) for length in (3, 11, 40)]
    engine = Engine(loaded, EngineConfig(drafter="auto", kv_bytes=1 << 20))
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    answers = {result.id: result.token_ids for result in engine.run(Request(str(n), prompt, params) for n, prompt in enumerate(prompts))}
    for number, prompt in enumerate(prompts):
        wanted = rounded.generate(torch.tensor([prompt]), max_new_tokens=24, min_new_tokens=24, do_sample=False)[0, len(prompt) :]
        assert list(answers[str(number)]) == wanted.tolist()


def test_weights_take_a_quarter_of_the_memory(folder: Path) -> None:
    sizes = {}
    for dtype in ("float32", "int8"):
        weights = load_model(str(folder), dtype=dtype).model._weights  # type: ignore[attr-defined]
        sizes[dtype] = sum(
            packed.weight.nbytes for layer in weights.layers for packed in (layer.qkv, layer.attention_out, layer.gate_up, layer.down)
        )
    assert sizes["int8"] * 4 == sizes["float32"]


@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("int8", False)])
def test_the_rows_of_a_head_are_what_it_multiplies_with(folder: Path, dtype: str, tied: bool) -> None:
    """A tied head has the embedding's; in eight bits it is rounded and the embedding is not."""
    frozen = load_model(str(folder), dtype=dtype).model.frozen()
    assert frozen.tied == tied == frozen.head_weight().equal(frozen.embedding)
    assert frozen.head_weight().equal(replace(frozen, tied=False).head_weight())


def test_what_cannot_run_it_says_so(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}))
    with pytest.raises(ValueError, match=r"dtype int8: gpt_neox runs on transformers' own modules; int8 is for .*llama"):
        load_model(str(folder), dtype="int8")
