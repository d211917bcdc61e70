"""Host memory in large pages, where the system has them: a step reads all over it, and with small pages each place costs a table walk."""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


_LARGE = 2 << 20
"""Bytes of a large page, which begins at a multiple of them."""
_BLOCK = 64 << 20
"""Bytes of a mapping that what lasts shares: with one each, a third or more of a small model's weights would lie in small pages."""


def zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU, in pages that the system hands out when they are first written and gets back as soon as nobody uses them.

    Raises OSError where there is no such room.
    """
    count = math.prod(shape)
    return torch.frombuffer(_mapped(max(count * dtype.itemsize, mmap.PAGESIZE)), dtype=dtype, count=count).view(*shape)


def lasting_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As `zeros`, for what is used as long as its neighbours are (a model's weights): they share large pages, and go together."""
    size = math.prod(shape) * dtype.itemsize
    if size > _BLOCK:
        return zeros(shape, dtype)
    with _lock:
        pages, place = _room.take(max(size, 1))
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape), offset=place).view(*shape)


def _mapped(size: int) -> mmap.mmap:
    """Private, because shared mappings (Python's default) are files to the system, which hardly ever get large pages."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class _Room:
    """What is left of a mapping that begins with a large page; then of the next one. Not for several threads at once."""

    def __init__(self) -> None:
        self._mapping: mmap.mmap | None = None
        self._next = self._end = 0

    def take(self, size: int) -> tuple[mmap.mmap, int]:
        """`size` bytes that were never written, `_BLOCK` at most: a mapping, which lives as long as a piece of it, and the place in it."""
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._mapping is None or self._next + size > self._end:
            self._mapping = _mapped(_BLOCK + _LARGE)
            self._next = -ctypes.addressof(ctypes.c_char.from_buffer(self._mapping)) % _LARGE
            self._end = self._next + _BLOCK
        place = self._next
        self._next += size
        return self._mapping, place


_room, _lock = _Room(), threading.Lock()


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
