"""Launch configurations: measured once, kept per device, found again by the next process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kernels.triton import tuning

CPU = torch.device("cpu")
CANDIDATES = [{"BLOCK": 16}, {"BLOCK": 32}, {"BLOCK": 64}]


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    tuning.forget()
    yield
    tuning.forget()


class Device:
    """A launch of 32 is the fastest."""

    def __init__(self) -> None:
        self.launched: list[int] = []

    def launch(self, config: tuning.Config) -> None:
        self.launched.append(config["BLOCK"])

    def measure(self, call: Callable[[], None]) -> float:
        call()
        return abs(self.launched[-1] - 32) + 1.0


def test_untuned_kernels_run_their_first_candidate() -> None:
    device = Device()
    assert tuning.best("op", "8", CPU, CANDIDATES, device.launch, device.measure) == CANDIDATES[0]
    assert device.launched == []


def test_the_fastest_is_kept_for_this_process_and_the_next(tmp_path: Path) -> None:
    device = Device()
    with tuning.tuning(tmp_path / "cache"):
        assert tuning.best("op", "8", CPU, CANDIDATES, device.launch, device.measure) == {"BLOCK": 32}
        assert device.launched == [16, 32, 64]
        assert tuning.best("op", "8", CPU, CANDIDATES, device.launch, device.measure) == {"BLOCK": 32}
    assert device.launched == [16, 32, 64], "known shapes are not measured again"
    assert tuning.best("op", "9", CPU, CANDIDATES, device.launch, device.measure) == CANDIDATES[0], "outside, new shapes are not measured"
    tuning.forget()
    assert tuning.load(tmp_path / "cache", CPU) == 1
    assert tuning.best("op", "8", CPU, CANDIDATES, device.launch, device.measure) == {"BLOCK": 32}


def test_a_file_that_is_no_table_counts_as_none(tmp_path: Path) -> None:
    device = Device()
    with tuning.tuning(tmp_path):
        tuning.best("op", "8", CPU, CANDIDATES, device.launch, device.measure)
    (path,) = tmp_path.glob("triton-cpu-*.json")
    path.write_text("{")
    tuning.forget()
    assert tuning.load(tmp_path, CPU) == 0


def test_what_is_no_longer_a_candidate_is_unknown(tmp_path: Path) -> None:
    device = Device()
    with tuning.tuning(tmp_path):
        tuning.best("op", "8", CPU, CANDIDATES, device.launch, device.measure)
        now = [{"BLOCK": 16, "AHEAD": 1}, {"BLOCK": 32, "AHEAD": 0}]
        assert tuning.best("op", "8", CPU, now, device.launch, device.measure) == now[1]
    assert tuning.best("op", "8", CPU, CANDIDATES, device.launch, device.measure) == CANDIDATES[0]


def test_what_does_not_fit_the_device_is_passed_over_once() -> None:
    from triton.runtime.errors import OutOfResources

    launched: list[int] = []

    def launch(config: tuning.Config) -> None:
        launched.append(config["BLOCK"])
        if config["BLOCK"] < room:
            raise OutOfResources(300_000, 232_448, "shared memory")

    room = 32
    for _ in range(2):
        tuning.run("op", "8", CPU, CANDIDATES, launch)
    assert launched == [16, 32, 32]
    room = 999
    with pytest.raises(OutOfResources):
        tuning.run("op", "9", CPU, CANDIDATES, launch)
    assert launched[3:] == [16, 32, 64]
