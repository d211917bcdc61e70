"""Reads a folder's safetensors and holds them against what the model expects, name by name and shape by shape."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file

from engine.checkpoints.mapped import map_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

_SHOWN = 6


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or those of its index. Raises ValueError where there are none."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        pickles = [path.name for path in [*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]]
        hint = f"; {', '.join(pickles[:_SHOWN])} is a pickle, which can run code and is never loaded" if pickles else ""
        raise ValueError(f"{directory} has neither model.safetensors nor model.safetensors.index.json{hint}")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise ValueError(f"{directory} lacks {_listed(missing)}, named in {index.name}")
    return [directory / name for name in names]


def read_tensors(directory: Path, *, mapped: bool = True) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint. Raises ValueError for a name that two files claim, or a file that is not whole.

    mapped: they stay in the file until they are used, each apart from the others, so that memory need not hold what was dropped. A
    process that uses them dies if the file is cut off meanwhile.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(directory):
        try:
            loaded = _apart(path) if mapped else load(path.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{path.name} cannot be read: {error}") from error
        twice = tensors.keys() & loaded.keys()
        if twice:
            raise ValueError(f"{path.name} repeats {_listed(twice)}")
        tensors.update(loaded)
    return tensors


def header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the numbers of a safetensors file begin, and of each tensor `shape`, `dtype` and `data_offsets` from there."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return 8 + size, entries


def _apart(path: Path) -> dict[str, torch.Tensor]:
    """What the library makes of a file, after its checks, each tensor in a mapping of its own instead of all in one."""
    begin, entries = header(path)
    with path.open("rb") as file:
        return {
            name: map_tensor(file.fileno(), begin + entries[name]["data_offsets"][0], tensor.shape, tensor.dtype)
            for name, tensor in load_file(path).items()
        }


def check_tensors(tensors: dict[str, torch.Tensor], model: Any) -> None:
    """Compares with the state dict of `model`, a transformers model on the meta device.

    Drops what transformers itself declares ignorable, and a stored copy of a tied tensor after checking that it is one.
    Raises ValueError with names for what is missing, left over or mis-shaped.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, original in tied_names(model).items():
        expected.pop(name, None)
        copy = tensors.pop(name, None)
        if copy is not None and original in tensors and not copy.equal(tensors[original]):
            raise ValueError(f"the config ties {name} to {original}, but the checkpoint holds two different tensors")
    ignorable = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
    for name in [name for name in tensors.keys() - expected.keys() if any(re.search(pattern, name) for pattern in ignorable)]:
        del tensors[name]
    if missing := expected.keys() - tensors.keys():
        raise ValueError(f"the checkpoint lacks {_listed(missing)}")
    if unused := tensors.keys() - expected.keys():
        raise ValueError(f"the checkpoint has tensors that this model does not use: {_listed(unused)}")
    wrong = [
        f"{name} {tuple(tensor.shape)}, expected {expected[name]}" for name, tensor in tensors.items() if tensor.shape != expected[name]
    ]
    if wrong:
        raise ValueError(f"the checkpoint has tensors of another shape than the config says: {_listed(wrong)}")


def tied_names(model: Any) -> dict[str, str]:
    """Tensor name -> the name it is the same tensor as, where the config asks for tying."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    keys = getattr(model, "_tied_weights_keys", None) or {}
    return dict(keys) if isinstance(keys, dict) else {}


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
