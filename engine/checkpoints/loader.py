"""`load_model`: from a name to a target model and its tokenizer."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import kernels
from engine.batch import ModelSpec, TargetModel
from engine.checkpoints.fit import GIB, check_fit, requirement
from engine.checkpoints.fp8 import take_scales
from engine.checkpoints.model_config import read_config
from engine.checkpoints.sources import LocalCheckpoint, default_cache_dir, fetch
from engine.checkpoints.tensors import check_tensors, read_tensors, tied_names
from engine.memory import free_bytes
from engine.models.families import FAMILIES, max_positions, read_architecture
from kernels import pages

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.checkpoints.cache import SharedFolders

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INT8 = "int8"
"""As a `dtype`: weights of products in eight bits, everything else in float32."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """tokenizer: transformers' own. directory: where config, weights and tokenizer lie."""

    model: TargetModel
    tokenizer: Any
    directory: Path


def load_model(
    source: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    cache_dir: Path | None = None,
    shared: SharedFolders | None = None,
    progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Loads a target model; `source`, `revision`, `cache_dir`, `shared` and `progress` as in `sources.fetch`.

    device: `auto` is CUDA where there is one. dtype: `auto` is float32 on a CPU; on a GPU, where float32 products are an order slower, the
    checkpoint's own type of 16 bits, or bfloat16. `int8`, on a CPU, rounds weights to eight bits (less memory, faster with few sequences,
    other answers) and computes in float32. Families of `engine.models.families` run on the lean decoder, other decoder-only models through
    `engine.models.fallback`. Code from a checkpoint is never run. Raises ValueError saying what is wrong with the checkpoint or why the
    model cannot run, NotEnoughMemoryError where it is too large for the device.
    """
    from transformers import AutoTokenizer

    kernels.keep_compiled((cache_dir or default_cache_dir()) / "native")
    checkpoint = fetch(source, revision=revision, cache_dir=cache_dir, shared=shared, progress=progress)
    config = read_config(checkpoint.directory)
    place = _device(device)
    number = _dtype(dtype, config, place)
    needed = requirement(checkpoint.directory, config, number.itemsize, int8=dtype == INT8)
    check_fit(checkpoint.name, needed, free_bytes(place), str(place))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory, trust_remote_code=False)
    if config.model_type in FAMILIES:
        model = _load_lean(checkpoint, config, number, place, int8=dtype == INT8)
    elif dtype == INT8:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"dtype int8: {config.model_type} runs on transformers' own modules; int8 is for {known}")
    else:
        from engine.models.fallback import load_fallback

        model = load_fallback(checkpoint.directory, config, lambda **shape: _spec(checkpoint, config, number, place, **shape))
    pages.give_back()  # what weights were made of on the way lies between what stays, too scattered for the allocator to use it again
    return LoadedModel(model, tokenizer, checkpoint.directory)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether products on `device` take weights in eight bits as they are stored."""
    return device.type == "cuda"


def fit(directory: str, dtype: str, device: str) -> str:
    """What a local checkpoint needs and what there is, in words, without loading it. Raises NotEnoughMemoryError where it does not fit."""
    folder, place = Path(directory), _device(device)
    config = read_config(folder)
    number = _dtype(dtype, config, place)
    needed, available = requirement(folder, config, number.itemsize, int8=dtype == INT8), free_bytes(place)
    check_fit(folder.name, needed, available, str(place))
    return f"needs {needed.total / GIB:.2f} GiB on {place}, {available / GIB:.2f} GiB are available"


def build_lean(tensors: dict[str, torch.Tensor], config: Any, make_spec: Callable[..., ModelSpec]) -> TargetModel:
    """The lean decoder from tensors in transformers' names, which it consumes. `make_spec` gets what only weights and config tell."""
    from transformers import AutoModelForCausalLM

    from engine.models.decoder import LeanDecoder
    from engine.models.rope import read_ropes
    from engine.models.weights import pack_weights

    arch = read_architecture(config)
    scales = take_scales(tensors, getattr(config, "quantization_config", None))
    if scales.by_name:
        config = copy(config)
        del config.quantization_config  # the shapes are those of the model as it was
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    check_tensors(tensors, empty)
    spec = make_spec(
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
    )
    scales = replace(scales, keep=multiplies_fp8(spec.device))
    names = {shape.rope for shape in arch.layers if shape.rope is not None}
    ropes = read_ropes(type(empty.model.rotary_emb), config, names, spec.device)
    tied = "lm_head.weight" in tied_names(empty)
    weights = pack_weights(tensors, arch, tied=tied, dtype=spec.dtype, device=spec.device, scales=scales, int8=spec.int8_weights)
    return LeanDecoder(spec, arch, ropes, weights)


def _load_lean(checkpoint: LocalCheckpoint, config: Any, dtype: torch.dtype, device: torch.device, *, int8: bool) -> TargetModel:
    tensors = read_tensors(checkpoint.directory)
    return build_lean(tensors, config, lambda **shape: replace(_spec(checkpoint, config, dtype, device, **shape), int8_weights=int8))


def _spec(
    checkpoint: LocalCheckpoint,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_kv_heads: int,
    head_dim: int,
    parameters: int,
) -> ModelSpec:
    return ModelSpec(
        name=checkpoint.name,
        revision=checkpoint.revision,
        num_layers=config.num_hidden_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=max_positions(config),
        eos_token_ids=_eos_token_ids(checkpoint.directory, config),
        dtype=dtype,
        device=device,
        parameter_bytes=parameters * dtype.itemsize,
    )


def _eos_token_ids(directory: Path, config: Any) -> tuple[int, ...]:
    """The generation config decides, as in transformers' `generate`; without one, the model config."""
    from transformers import GenerationConfig

    ids = config.eos_token_id
    if (directory / "generation_config.json").exists():
        ids = GenerationConfig.from_pretrained(directory).eos_token_id
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no CUDA device")
    return device


def _dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    if name == INT8:
        if device.type != "cpu":
            raise ValueError(
                f"dtype int8 is for CPUs, and the device is {device}; on a GPU load an FP8 checkpoint for weights in eight bits"
            )
        return torch.float32
    if name != "auto":
        if name not in _DTYPES:
            raise ValueError(f"unknown dtype {name!r}, choose from auto, {', '.join(_DTYPES)}, {INT8}")
        return _DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    own = getattr(config, "dtype", None)
    return own if own in (torch.float16, torch.bfloat16) else torch.bfloat16
