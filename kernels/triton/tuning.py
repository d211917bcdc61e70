"""Launch configurations found by measuring, kept per device.

Untuned kernels run their first candidate. Within `tuning(folder)`, a kernel that meets new shapes tries all its candidates (on the
device, so never inside a graph capture), and what was fastest is kept in `folder`, in a file named after the device and Triton's version.
"""

from __future__ import annotations

import contextlib
import json
import os
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
import triton

from kernels.triton.ahead import compile_in_parallel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Config = dict[str, int]

_COMPILING = 120.0
"""Seconds after which candidates that still compile beside are compiled by who measures them."""


class _Table:
    """What is known, by device file and kernel key; and whether new shapes are measured."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, Config]] = {}
        self.fitting: dict[tuple[str, str], Config] = {}
        """What untuned kernels run where their first candidate does not fit the device, by device file and kernel key."""
        self.folder: Path | None = None
        self.compiled = False
        """Whether candidates lie in Triton's cache already."""
        self.every = False


_TABLE = _Table()


def load(folder: Path, device: torch.device) -> int:
    """Reads what earlier runs found for this device. Returns how many configurations there are; a file that is no table counts as none."""
    path = folder / _file(device)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    _TABLE.known[_file(device)] = found
    return len(found)


@contextlib.contextmanager
def tuning(folder: Path, *, compiled: bool = False) -> Iterator[None]:
    """Measures candidates of shapes that are new, and keeps the fastest in `folder` (made if need be).

    compiled: they lie in Triton's cache; otherwise those of a kernel are compiled in parallel before the first is measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = _TABLE.folder, _TABLE.compiled
    _TABLE.folder, _TABLE.compiled = folder, compiled
    try:
        yield
    finally:
        _TABLE.folder, _TABLE.compiled = before


@contextlib.contextmanager
def every_candidate() -> Iterator[None]:
    """Within it, `run` launches all candidates: for launches that compile (see `kernels.triton.ahead`)."""
    before, _TABLE.every = _TABLE.every, True
    try:
        yield
    finally:
        _TABLE.every = before


def run(kernel: str, key: str, device: torch.device, candidates: list[Config], launch: Callable[[Config], None]) -> None:
    """Launches `kernel` with the configuration for shapes that `key` names. One that asks more of the device than it has is passed over;
    raises triton's OutOfResources where all do.
    """
    if _TABLE.every:
        _each(launch, candidates)
        return
    name = (_file(device), f"{kernel}/{key}")
    chosen = best(kernel, key, device, candidates, launch)
    chosen = _TABLE.fitting.get(name, chosen) if chosen == candidates[0] else chosen
    others = [config for config in candidates if config != chosen]
    for config in (chosen, *others):
        try:
            launch(config)
        except triton.runtime.errors.OutOfResources:
            if others and config != others[-1]:
                continue
            raise
        if config != chosen:
            _TABLE.fitting[name] = config
        return


def best(
    kernel: str,
    key: str,
    device: torch.device,
    candidates: list[Config],
    launch: Callable[[Config], None],
    measure: Callable[[Callable[[], None]], float] | None = None,
) -> Config:
    """The configuration for `kernel` on shapes that `key` names. `launch` runs one; it must bear being run again. What an older version
    found and this one would not try counts as unknown.

    measure: seconds of a call, by default Triton's own timer on the device.
    """
    known = _TABLE.known.setdefault(_file(device), {})
    name = f"{kernel}/{key}"
    if (found := known.get(name)) in candidates:
        return found
    if _TABLE.folder is None or (device.type != "cuda" and measure is None):
        return candidates[0]
    if device.type == "cuda" and not _TABLE.compiled and len(candidates) > 1:
        compile_in_parallel(partial(_each, launch, candidates), device, _COMPILING, min(len(candidates), os.cpu_count() or 1))
    times = [_seconds(launch, config, measure) for config in candidates]
    known[name] = candidates[times.index(min(times))]
    path = _TABLE.folder / _file(device)
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")
    scratch.replace(path)
    return known[name]


def found(device: torch.device) -> dict[str, Config]:
    """The configurations that were measured for this device, now or before, by kernel key."""
    return dict(_TABLE.known.get(_file(device), {}))


def forget() -> None:
    """Drops what is known in this process; files stay."""
    _TABLE.known.clear()
    _TABLE.fitting.clear()


def _each(launch: Callable[[Config], None], candidates: list[Config]) -> None:
    for config in candidates:
        launch(config)


def _seconds(launch: Callable[[Config], None], config: Config, measure: Callable[[Callable[[], None]], float] | None) -> float:
    try:
        return (measure or _device_time)(lambda: launch(config))
    except triton.runtime.errors.OutOfResources:
        return float("inf")  # more shared memory or registers than this device has


def _device_time(call: Callable[[], None]) -> float:
    return float(triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median"))


@cache
def _file(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    safe = "".join(c if c.isalnum() else "-" for c in name).lower()
    return f"triton-{safe}-{triton.__version__}.json"
