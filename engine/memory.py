"""How much memory is free for a KV cache: of the GPU, or of this process's share of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_REFUSALS = ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc", "could not create a memory")


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`; on a CPU the least of what the machine and this process's cgroup allow."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    bounds = [_machine_free(), _cgroup_free()]
    return min(bound for bound in bounds if bound is not None)


def is_exhausted(error: BaseException) -> bool:
    """Whether `error` says that memory for a step was refused: by a GPU's allocator, by torch's on a CPU, by numpy or oneDNN."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _REFUSALS)


def _machine_free() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup_free() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return None  # no cgroup v2
    return None if limit == "max" else max(int(limit) - used, 0)
