"""Host memory in large pages, where the system has them: a step reads all over it, and with small pages each place costs a table walk."""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU, in pages that the system hands out when they are first written.

    Private, because shared mappings (Python's default) are files to the system, which hardly ever get large pages. Raises OSError where
    there is no such room.
    """
    size = max(math.prod(shape) * dtype.itemsize, mmap.PAGESIZE)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(*shape)
