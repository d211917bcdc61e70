"""Models that a config alone rules out are refused by name, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from engine.checkpoints.model_config import read_config
from engine.models.families import FAMILIES
from engine.models.refusals import refuse
from tests.unit.engine.models.cases import FALLBACK

REFUSED = {
    "mamba2": "layers of type linear_attention, which keep a state",
    "jamba": "layers of type linear_attention, which keep a state",
    "qwen3_next": "layers of type linear_attention, which keep a state",
    "lfm2": "layers of type conv, which keep a state",
    "falcon_h1": "layers of type hybrid, which keep a state",
    "rwkv": "keeps recurrent state",
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
    "llama4_text": "layers of type chunked_attention; only full and sliding attention can be paged",
    "t5": "an encoder-decoder model",
    "whisper": "an encoder-decoder model",
    "gemma3": "has a vision tower",
    "llava": "has a vision tower",
    "qwen2_audio": "has an audio tower",
    "vit": "is not a language model",
    "bloom": "does not use transformers' attention interface",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_config(model_type: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[model_type](
        **({"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]} if model_type == "lfm2" else {})
    )
    with pytest.raises(ValueError, match=f"^{model_type} .*{REFUSED[model_type]}"):
        refuse(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{model_type} .*{REFUSED[model_type]}"):
        read_config(tmp_path)


@pytest.mark.parametrize("model_type", sorted({*FAMILIES, *(model_type for model_type, _ in FALLBACK.values())}))
def test_what_is_served_is_not(model_type: str) -> None:
    refuse(CONFIG_MAPPING[model_type]())


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (None, "has no config.json"),
        ("{}", "has no model_type"),
        ('{"model_type": "mystery"}', r"model type 'mystery' is not part of transformers [\d.]+$"),
        ('{"model_type": "mystery", "auto_map": {"AutoConfig": "x.Config"}}', "it brings its own code, which is never run"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}', r"is stored quantised \(awq\)"),
        ('{"model_type": "llama", "quantization_config": {}}', r"is stored quantised \(an unnamed method\)"),
    ],
)
def test_folders_that_are_not_read(stored: str | None, reason: str, tmp_path: Path) -> None:
    if stored is not None:
        (tmp_path / "config.json").write_text(stored)
    with pytest.raises(ValueError, match=reason):
        read_config(tmp_path)
