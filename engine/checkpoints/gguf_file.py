"""Read access to a GGUF file: typed metadata and dequantised tensors. The only file that knows the `gguf` package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

_HALF = {"F16": "float16", "BF16": "bfloat16"}


class GGUFFile:
    """One GGUF file, memory-mapped. Raises ImportError without the `gguf` package and ValueError where the file is none."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise ImportError("reading a GGUF file needs the package `gguf`; install longdraft[engine]") from error
        self._gguf = gguf
        self._reader = gguf.GGUFReader(path)
        self.architecture = str(self.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as plain Python; float32 values as the shortest decimal that is the same float32 (1e-05, say)."""
        field = self._reader.fields.get(key)
        if field is None:
            return default
        value = field.contents()
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, key: str) -> Any:
        """As `get`; raises ValueError where the key is missing."""
        value = self.get(key)
        if value is None:
            raise ValueError(f"the GGUF file lacks the metadata key {key}")
        return value

    def own(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own section: `own("block_count")` is `llama.block_count` in a llama file."""
        return self.get(f"{self.architecture}.{key}", default)

    def tensor_names(self) -> set[str]:
        return {tensor.name for tensor in self._reader.tensors}

    def tensors(self) -> Iterator[tuple[str, NDArray[np.float32], str]]:
        """(name, float32 values in row-major [out, in] order, the type that holds them exactly), dequantised one at a time."""
        for tensor in self._reader.tensors:
            kind = _HALF.get(tensor.tensor_type.name, "float32")
            yield tensor.name, self._gguf.dequantize(tensor.data, tensor.tensor_type), kind

    def tensor(self, name: str) -> NDArray[np.float32]:
        """One float32 tensor by name. Raises KeyError."""
        found = {tensor.name: tensor for tensor in self._reader.tensors}[name]
        values: NDArray[np.float32] = self._gguf.dequantize(found.data, found.tensor_type)
        return values

    @property
    def storage_dtype(self) -> str:
        """The model's own type: half precision if all matrices have it, otherwise float32. Norms are float32 in either case."""
        kinds = {tensor.tensor_type.name for tensor in self._reader.tensors if len(tensor.shape) > 1}
        return _HALF.get(next(iter(kinds)), "float32") if len(kinds) == 1 else "float32"
