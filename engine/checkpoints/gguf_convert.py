"""GGUF file -> folder in Hugging Face's layout, which both this engine and transformers load."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from engine.checkpoints.gguf_config import read_config
from engine.checkpoints.gguf_file import GGUFFile
from engine.checkpoints.gguf_layouts import IN_CONFIG, layout_of, restore, transformers_name
from engine.checkpoints.gguf_tokenizer import read_tokenizer
from engine.checkpoints.tensors import check_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from engine.checkpoints.chat_formats import ChatFormat
    from engine.checkpoints.gguf_layouts import Layout

_SHARD_BYTES = 4 << 30

_SAMPLE_TEXT = "I've 12 + 345 = 6789.\n\n  def f(x):\n\treturn x**2  # caf\u00e9 \u4f60\u597d \U0001f600 don't\r\n   END"


def convert(gguf: Path, folder: Path, chat: ChatFormat | None = None) -> None:
    """Writes config, generation config, weights and tokenizer of `gguf` into `folder`; `chat` is for a file without a chat template.

    Quantised weights become the float32 values they stand for; F16 and BF16 weights keep their type. Raises ValueError for an
    architecture, tokenizer or tensor set that would not be converted exactly.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    file = GGUFFile(gguf)
    layout = layout_of(file)
    values = read_config(file, layout)
    dtype = getattr(torch, file.storage_dtype)
    model_type = values.pop("model_type")
    config = AutoConfig.for_model(model_type, dtype=dtype, **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer = read_tokenizer(file, gguf)
    ends = _end_tokens(file)
    if chat is not None and not tokenizer.chat_template:
        tokenizer.chat_template = chat.template
        ends.append(tokenizer.convert_tokens_to_ids(chat.end_of_turn))
    GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=ends, pad_token_id=config.pad_token_id).save_pretrained(folder)
    _write_weights(_tensors(file, layout, values), folder, model)
    _write_tokenizer(tokenizer, folder)


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """transformers chooses a tokenizer class by the model's type and may put its own splitting in place of the saved one."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if again(_SAMPLE_TEXT).input_ids != tokenizer(_SAMPLE_TEXT).input_ids:
        raise ValueError(f"transformers loads another tokenizer from the converted folder ({type(again).__name__}); ids would differ")


def _end_tokens(file: GGUFFile) -> list[int]:
    """End of text, and end of turn where it is another token."""
    ids = [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(index for index in ids if index is not None))


def _tensors(file: GGUFFile, layout: Layout, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, values, dtype in file.tensors():
        if name in IN_CONFIG:
            continue  # already part of the config, see gguf_config
        target = transformers_name(name, layout)
        yield (
            target,
            torch.tensor(restore(target, values, layout, config), dtype=getattr(torch, dtype)),
        )  # a copy: the file is mapped read-only


def _write_weights(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, model: Any) -> None:
    """One model.safetensors, or shards of at most 4 GiB with an index; holds one shard at a time."""
    seen: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        save_file(shard, folder / f"model-{len(shards):05}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    size = 0
    for name, tensor in tensors:
        if size + tensor.nbytes > _SHARD_BYTES and shard:
            flush()
            size = 0
        size += tensor.nbytes
        shard[name] = tensor
        seen[name] = torch.empty(tensor.shape, device="meta")
    flush()
    check_tensors(seen, model)
    if len(shards) == 1:
        (folder / "model-00000.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {name: f"model-{index:05}.safetensors" for index, names in enumerate(shards) for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
