"""The lookup drafters and the registry."""

from __future__ import annotations

import numpy as np
import pytest

from engine.drafters.base import DraftBatch, Drafter, Drafts
from engine.drafters.ngram import NgramDrafter
from engine.drafters.registry import Catalogue, UnknownDrafterError
from engine.drafters.suffix import SuffixDrafter
from engine.sequence import Sequence
from engine.types import Request, SamplingParams
from tests.unit.engine.hash_model import HashModel


def sequence(serial: int, tokens: list[int], output: list[int] = [], template: str | None = None) -> Sequence:  # noqa: B006 - never changed
    made = Sequence(Request(str(serial), tuple(tokens), SamplingParams(max_tokens=500), template=template), serial, 10_000)
    made.append(np.array(output, np.int64))
    return made


def propose(drafter: Drafter, *sequences: Sequence, limit: int = 4) -> Drafts:
    return drafter.propose(DraftBatch(list(sequences), np.full(len(sequences), limit), 1))


@pytest.mark.parametrize("drafter", [NgramDrafter(), SuffixDrafter()])
def test_the_longest_match_in_own_text_goes_on(drafter: Drafter) -> None:
    drafts = propose(drafter, sequence(1, [5, 1, 2, 3, 8, 9, 2, 3, 7, 1, 2, 3]), sequence(2, [1, 2, 3]))
    assert drafts.lengths.tolist() == [4, 0]
    assert drafts.token_ids[0].tolist() == [8, 9, 2, 3]
    assert drafts.bins[0].tolist() == [3, 4, 5, 6]
    assert drafts.bins[1].tolist() == [-1] * 4


@pytest.mark.parametrize("drafter", [NgramDrafter(), SuffixDrafter()])
def test_text_that_grew_since_the_last_step_is_found(drafter: Drafter) -> None:
    grown = sequence(1, [1, 2, 3, 4])
    assert propose(drafter, grown).lengths.tolist() == [0]
    grown.append(np.array([9, 9, 1, 2]))
    assert propose(drafter, grown).token_ids[0].tolist() == [3, 4, 9, 9]


def test_a_finished_sibling_drafts_for_the_others() -> None:
    drafter = SuffixDrafter()
    done = sequence(1, [1, 2, 3, 4], [50, 51, 52, 53], template="t")
    drafter.finish(done, complete=True)
    drafts = propose(drafter, sequence(2, [9, 2, 3, 4], template="t"), sequence(3, [9, 2, 3, 4], template="other"))
    assert drafts.lengths.tolist() == [4, 4]
    drafter.remember("other", [2, 3, 4, 60, 61])
    drafts = propose(drafter, sequence(4, [9, 2, 3, 4], template="t"), sequence(5, [9, 2, 3, 4], template="other"))
    assert drafts.token_ids[:, 0].tolist() == [50, 60]
    assert drafts.token_ids[0].tolist() == [50, 51, 52, 53]


def test_an_aborted_sibling_teaches_nothing() -> None:
    drafter = SuffixDrafter()
    drafter.finish(sequence(1, [1, 2, 3, 4], [50, 51, 52]), complete=False)
    assert propose(drafter, sequence(2, [9, 2, 3, 4])).lengths.tolist() == [0]


def test_memory_of_finished_texts_is_bounded_and_the_latest_are_kept() -> None:
    drafter = SuffixDrafter(max_tokens=200)
    for number in range(100):
        drafter.finish(sequence(number, [number, 1, 2], [300 + number] * 20, template=str(number % 5)), complete=True)
    held = sum(map(len, drafter._siblings.values()))
    assert held <= 200
    drafts = propose(drafter, sequence(1000, [99, 1, 2], template=str(99 % 5)))
    assert drafts.token_ids[0].tolist() == [399] * 4


def test_names_resolve() -> None:
    spec = HashModel().spec
    auto, off = Catalogue("auto", None, spec), Catalogue("off", None, spec)
    assert auto.resolve("auto") == "suffix"
    assert off.resolve("auto") is None
    assert off.resolve("ngram") == "ngram"
    assert auto.resolve("off") is None
    with pytest.raises(UnknownDrafterError, match="auto, off, ngram, suffix"):
        auto.resolve("eagle")
    for name in ("ngram", "suffix"):
        assert auto.create(name).name == name
