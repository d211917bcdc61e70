"""Reads a folder's config.json, and says at once why its model cannot be served."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from engine.checkpoints.fp8 import fp8_block
from engine.models.families import FAMILIES
from engine.models.refusals import refuse

if TYPE_CHECKING:
    from pathlib import Path


def read_config(directory: Path) -> Any:
    """The transformers config of a model that is not refused outright. Code from the folder is never run.

    Raises ValueError for a folder without a readable config, a type that transformers does not know, weights that are stored quantised, and
    what `engine.models.refusals` knows.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    path = directory / "config.json"
    if not path.exists():
        raise ValueError(f"{directory} has no config.json, so it is no checkpoint in Hugging Face's layout")
    stored = json.loads(path.read_text())
    model_type = stored.get("model_type")
    if model_type is None:
        raise ValueError(f"{path} has no model_type")
    if model_type not in CONFIG_MAPPING:
        own_code = "; it brings its own code, which is never run" if "auto_map" in stored else ""
        raise ValueError(f"model type {model_type!r} is not part of transformers {transformers.__version__}{own_code}")
    quantisation = stored.get("quantization_config")
    if quantisation is not None and (fp8_block(quantisation) is None or model_type not in FAMILIES):
        method = quantisation.get("quant_method", "an unnamed method") if isinstance(quantisation, dict) else quantisation
        raise ValueError(
            f"{directory} is stored quantised ({method}); load the original weights or a GGUF file"
            " (block-scaled fp8 runs for the families of the lean decoder)"
        )
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    refuse(config)
    return config


def runs_on(directory: Path) -> str:
    """What would run a local checkpoint, in words: the lean decoder, transformers' own code, or the reason why nothing does."""
    try:
        model_type = read_config(directory).model_type
    except (ValueError, OSError) as error:
        return f"refused: {error}"
    if model_type in FAMILIES:
        return f"lean decoder ({model_type})"
    return f"transformers' code ({model_type}): slower, exact; checked when loaded"
