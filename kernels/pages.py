"""Host memory in large pages, where the system has them: a step reads all over it, and with small pages each place costs a table walk."""

from __future__ import annotations

import ctypes
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


_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE (Linux 5.14), which Python's mmap module does not name."""


def take(part: torch.Tensor) -> None:
    """Has the system give the pages of contiguous `part` now rather than when they are written. Contents stay. Older systems do nothing."""
    first = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(part.data_ptr() + part.nbytes - first), _POPULATE_WRITE)


def give_back() -> None:
    """Has the C library's allocator give the pages of all it has free back to the system. Only where that library is GNU's."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT = 1 << 30
_LARGEST_KEPT = 1 << 28


def keep_freed() -> None:
    """Tells the C library's allocator to keep what a step frees for the next one: given back, every page of it would be zeroed again.

    Up to 1 GiB, of pieces up to 256 MiB. Only where that library is GNU's.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
