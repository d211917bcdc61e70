"""Parts of a file as memory, each in a mapping of its own: it goes as soon as nothing uses it, and takes its pages along."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import cache
from math import prod
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

_FAILED = ctypes.c_void_p(-1).value


def map_tensor(descriptor: int, start: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The tensor whose numbers begin at byte `start` of an open file, which may be closed afterwards. Writing to it leaves the file alone.

    Not Python's mmap, which keeps a file descriptor for each mapping. Raises OSError where the system refuses.
    """
    count = prod(shape)
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    size = start - first + count * dtype.itemsize
    address = _libc().mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, descriptor, first)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    whole = (ctypes.c_char * size).from_address(address)
    weakref.finalize(whole, _libc().munmap, address, size).atexit = False
    return torch.frombuffer(whole, dtype=dtype, count=count, offset=start - first).view(*shape)


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
