"""Drafter folders: what training writes, bundling one into a model's folder, and DeepSpec's full layout."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from engine.checkpoints.drafters.check import block_shapes, check_tensors
from engine.checkpoints.drafters.errors import DrafterError
from engine.checkpoints.drafters.folder import CALIBRATION, RECORD
from engine.checkpoints.drafters.formats import DEEPSPEC, block_spec
from engine.drafters.sources import BESIDE

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from engine.batch import FrozenParts
    from engine.checkpoints.drafters.folder import DrafterFolder

_FROZEN = ("embed_tokens.weight", "lm_head.weight")


def write_folder(
    path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], record: dict[str, Any], calibration: dict[str, Any] | None = None
) -> Path:
    """config.json, model.safetensors in half precision, and what Longdraft keeps beside them."""
    path.mkdir(parents=True, exist_ok=True)
    stored = {name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous().cpu() for name, tensor in tensors.items()}
    part = path / f".model.safetensors.{os.getpid()}"  # an engine that runs must not find half a file
    save_file(stored, part, metadata={"format": "pt"})
    part.replace(path / "model.safetensors")
    _write(path / "config.json", config)
    _write(path / RECORD, record)
    if calibration is not None:
        _write(path / CALIBRATION, calibration)
    return path


def write_record(path: Path, record: dict[str, Any]) -> None:
    _write(path / RECORD, record)


def set_calibration(folder: DrafterFolder, calibration: dict[str, Any]) -> None:
    _write(folder.path / CALIBRATION, calibration)


def pack(folder: DrafterFolder, model: Path) -> Path:
    """Copies a drafter into a model's folder, where `auto` finds it. Raises DrafterError where one of that name is there already."""
    target = model / BESIDE / folder.name
    if target.exists():
        raise DrafterError(f"{target} exists already; remove it first, or rename the drafter in {RECORD}")
    part = target.with_name(f".{target.name}.{os.getpid()}")  # an engine that runs must not find half a drafter
    part.mkdir(parents=True)
    for item in folder.path.iterdir():
        if item.suffix in (".json", ".safetensors"):
            shutil.copy2(item, part / item.name)
    part.rename(target)
    return target


def set_tags(folder: DrafterFolder, tags: Iterable[str]) -> list[str]:
    """The tasks that a drafter was made for, in place of those it had; none: all. Returns them as they are written."""
    found = sorted(set(tags))
    _write(folder.path / RECORD, folder.record | {"tags": found})
    return found


def export(folder: DrafterFolder, frozen: FrozenParts, out: Path) -> Path:
    """Writes DeepSpec's full layout: the target's embedding and output head are stored with the drafter. Raises DrafterError for others."""
    if folder.layout != DEEPSPEC:
        raise DrafterError(
            f"{folder.path} is of layout {folder.layout}; only DSpark and DFlash of DeepSpec's layout can be exported in full"
        )
    config = {key: value for key, value in folder.config.items() if key != "shared_with_target"}
    tensors = folder.tensors()
    spec = block_spec(config)
    if "embed_tokens.weight" not in tensors:
        tensors["embed_tokens.weight"] = frozen.embedding
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = frozen.head_weight().clone()  # a tied one shares its memory, which no file can say
    check_tensors(tensors, *block_shapes(spec), spec.format)
    return write_folder(out, config, tensors, folder.record, folder.calibration or None)


def new_config(
    target: dict[str, Any],
    *,
    layers: int,
    block_size: int,
    rank: int,
    head: str,
    taps: list[int],
    mask_token_id: int,
    intermediate_size: int,
) -> dict[str, Any]:
    """config.json of a fresh DSpark drafter for a target of Llama's or Qwen's kind; rank 0 is DFlash. taps: target layers, from 0."""
    heads = target["num_attention_heads"]
    return {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "hidden_size": target["hidden_size"],
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": target.get("num_key_value_heads") or heads,
        "head_dim": target.get("head_dim") or target["hidden_size"] // heads,
        "vocab_size": target["vocab_size"],
        "rms_norm_eps": target.get("rms_norm_eps", 1e-6),
        "rope_theta": target.get("rope_theta") or (target.get("rope_parameters") or {}).get("rope_theta", 10000.0),
        "max_position_embeddings": target["max_position_embeddings"],
        "hidden_act": "silu",
        "num_target_layers": target["num_hidden_layers"],
        "block_size": block_size,
        "mask_token_id": mask_token_id,
        "target_layer_ids": taps,
        "markov_rank": rank,
        "markov_head_type": head,
        "enable_confidence_head": True,
        "confidence_head_with_markov": rank > 0,
        "shared_with_target": list(_FROZEN),
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
