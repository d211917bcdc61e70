"""The pool of KV blocks by itself; what the scheduler makes of it is tested with that."""

from __future__ import annotations

from engine.kv_blocks import BlockPool


def test_a_pool_grows_without_touching_what_it_holds() -> None:
    pool = BlockPool(4, 4)
    held = pool.allocate(3)
    pool.grow(3)
    assert sorted(pool.allocate(3)) == [4, 5, 6]
    pool.release(held, 0)
    pool.check()
