"""The pool of KV blocks by itself; what the scheduler makes of it is tested with that."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.kv_blocks import ROOT, BlockPool


def test_a_pool_grows_without_touching_what_it_holds() -> None:
    pool = BlockPool(4, 4)
    held = pool.allocate(3)
    pool.grow(3)
    assert sorted(pool.allocate(3)) == [4, 5, 6]
    pool.release(held, 0)
    pool.check()


def computed(pool: BlockPool, contents: list[list[int]]) -> list[int]:
    """First blocks of texts, computed by the end of a step."""
    blocks = pool.allocate(len(contents))
    for block, content in zip(blocks, contents, strict=True):
        pool.announce([block], 0, 1, np.array(content, np.int64), block)
    pool.mark_computed(blocks)
    return blocks


@given(
    contents=st.lists(st.lists(st.integers(0, 300), min_size=4, max_size=4), min_size=1, max_size=12, unique_by=tuple),
    wanted=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    released=st.integers(0, 12),
)
def test_the_nearest_block_has_most_in_common(contents: list[list[int]], wanted: list[int], released: int) -> None:
    pool = BlockPool(len(contents) + 1, 4)
    contents[0][: len(wanted) - 1] = wanted[:-1]
    if contents[0] in contents[1:]:
        return
    blocks = computed(pool, contents)
    pool.begin_step()
    gone, left = blocks[:released], blocks[released:]
    for block in gone:
        pool.release([block], block)
    pool.allocate(len(gone))  # evicts them
    pool.check()

    def common(content: list[int]) -> int:
        return next((index for index, (a, b) in enumerate(zip(content, wanted, strict=False)) if a != b), len(wanted))

    found, count = pool.nearest(ROOT, np.array(wanted, np.int64))
    assert count == max((common(content) for content in contents[released:]), default=0)
    assert found == ROOT if count == 0 else common(contents[blocks.index(found)]) == count
    assert found in {ROOT, *left}


def test_what_a_step_computes_is_copied_from_the_next_one_on() -> None:
    pool = BlockPool(4, 4)
    (block,) = computed(pool, [[1, 2, 3, 4]])
    wanted = np.array([1, 2, 9], np.int64)
    assert pool.nearest(ROOT, wanted) == (ROOT, 0)
    pool.begin_step()
    assert pool.nearest(ROOT, wanted) == (block, 2)
    assert pool.nearest(block, wanted) == (ROOT, 0), "another text came before it"


def test_what_was_not_computed_after_all_is_not_copied() -> None:
    pool = BlockPool(4, 4)
    blocks = computed(pool, [[1, 2, 3, 4]])
    pool.forget(blocks)
    pool.begin_step()
    assert pool.nearest(ROOT, np.array([1, 2], np.int64)) == (ROOT, 0)
    pool.check()
