"""Files of what was learned of drafters: whole or ignored, and each for one drafter as it is."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pytest

from engine.drafter_records import DrafterRecords
from engine.speculation.experience import PRICES, Experience

STAMPS: dict[str, tuple[object, ...]] = {"a": ((1, "x"),), "b/c": ()}


def made(brought: float) -> Experience:
    experience = Experience()
    experience.add_brought(np.full(len(PRICES), brought), 8)
    return experience


def worth(experience: Experience | None) -> float:
    assert experience is not None
    return float(experience.brought.total[0] / experience.brought.weight)


def test_each_drafter_has_its_own_and_another_machine_or_other_weights_know_nothing(tmp_path: Path) -> None:
    records = DrafterRecords(tmp_path / "new", ["model", "machine"], STAMPS.__getitem__)
    assert records.recall("a") is None
    records.keep("a", made(1.0))
    records.keep("b/c", made(2.0))
    records.keep("a", made(3.0))
    again = DrafterRecords(tmp_path / "new", ["model", "machine"], STAMPS.__getitem__)
    assert (worth(again.recall("a")), worth(again.recall("b/c"))) == pytest.approx((3.0, 2.0))
    assert DrafterRecords(tmp_path / "new", ["model", "another"], STAMPS.__getitem__).recall("a") is None
    assert DrafterRecords(tmp_path / "new", ["model", "machine"], lambda _: ((2, "x"),)).recall("a") is None
    assert len(list((tmp_path / "new").iterdir())) == 2


@pytest.mark.parametrize("text", ["", "{", '{"brought": []}', "[]", '"\\ud800"'])
def test_a_file_that_is_none_of_ours_is_as_if_there_were_none(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    records = DrafterRecords(tmp_path, ["machine"], STAMPS.__getitem__)
    records.keep("a", made(1.0))
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert records.recall("a") is None
    assert str(path) in caplog.text
    path.write_bytes(b"\xff\xfe")
    assert records.recall("a") is None
    records.keep("a", made(2.0))
    assert worth(records.recall("a")) == pytest.approx(2.0)


def test_a_folder_that_cannot_be_written_costs_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    records = DrafterRecords(tmp_path / "file", ["machine"], STAMPS.__getitem__)
    with caplog.at_level(logging.WARNING):
        records.keep("a", made(1.0))
        assert records.recall("a") is None
    assert "cannot be kept" in caplog.text


def test_whoever_reads_while_others_write_sees_a_whole_file(tmp_path: Path) -> None:
    records = DrafterRecords(tmp_path, ["machine"], STAMPS.__getitem__)
    records.keep("a", made(1.0))
    experiences = [made(float(number)) for number in range(1, 4)]

    def write(experience: Experience) -> None:
        for _ in range(100):
            records.keep("a", experience)

    threads = [threading.Thread(target=write, args=(experience,)) for experience in experiences]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        seen.add(round(worth(records.recall("a"))))
    for thread in threads:
        thread.join()
    assert seen <= {1, 2, 3}
    assert round(worth(records.recall("a"))) in {1, 2, 3}
    assert len(list(tmp_path.iterdir())) == 1
