"""Between the host and a device without waiting for either."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_ALIGNMENT = 4
"""Numbers of staged arrays that a part begins at a multiple of: 16 bytes, so that kernels are compiled once, whatever the row count."""


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """`array` as a tensor on `device`. To a GPU it goes through pinned memory: out of any other, the copy waits for all work before it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def all_to_device(parts: Sequence[NDArray[np.generic]], device: torch.device) -> list[torch.Tensor]:
    """All parts (of one type, one-dimensional) in one copy."""
    sizes = [-(-len(part) // _ALIGNMENT) * _ALIGNMENT for part in parts]
    whole = np.zeros(sum(sizes), parts[0].dtype)
    begin = 0
    for part, size in zip(parts, sizes, strict=True):
        whole[begin : begin + len(part)] = part
        begin += size
    return [tensor[: len(part)] for tensor, part in zip(to_device(whole, device).split(sizes), parts, strict=True)]


class Arrival:
    """Tensors on their way to the host. What they are copied into is there from the start, so nothing is missing once they are made."""

    def __init__(self, *shapes: tuple[tuple[int, ...], torch.dtype], device: torch.device) -> None:
        self._device = device
        self._host = [torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda") for shape, dtype in shapes]
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def send(self, *tensors: torch.Tensor) -> None:
        """Starts the copies, in the order of the shapes."""
        for host, tensor in zip(self._host, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def read(self) -> list[NDArray[Any]]:
        """Waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return [host.numpy() for host in self._host]
