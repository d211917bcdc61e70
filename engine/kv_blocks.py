"""Which KV block belongs to whom: reference counts, the prefix tree, and eviction. No torch: a block is a number.

Full blocks form a tree keyed by exact content: a child's key is (parent's block, its tokens), so two equal keys mean two equal
prefixes and nothing rests on a hash being unique. Block 0 is never handed out: it is the root of the tree, and a safe target
for padding.

Invariant behind eviction: whoever holds a block also holds its parents, and gives them back deepest first. Among unreferenced
blocks a child is therefore always older than its parent, and evicting the oldest never leaves a child without its parent.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

ROOT = 0


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than are free. The scheduler answers by preempting; a user never sees this."""


class BlockPool:
    """Block accounting of one KV pool of `num_blocks` blocks with `block_size` tokens each.

    A block is free, cached (unreferenced, its content may be found again), or held by one or more sequences. A held block
    may be *pending*: its place in the tree is taken by an owner that has not computed it yet, so that siblings wait for the
    owner instead of computing the same prefix twice.
    """

    def __init__(self, num_blocks: int, block_size: int, *, share_prefixes: bool = True) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(f"a pool needs at least 2 blocks of at least 1 token, got {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._share = share_prefixes
        self._free = list(range(num_blocks - 1, ROOT, -1))
        self._references = [0] * num_blocks
        self._keys: list[tuple[int, bytes] | None] = [None] * num_blocks
        self._tree: dict[tuple[int, bytes], int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._owners: dict[int, int] = {}
        self._computed: list[int] = []
        """Blocks whose content is there by the end of the step that is being put together."""
        self._alike: dict[int, list[tuple[bytes, int]]] = {}
        """By parent, content and number of the blocks that may be copied from, sorted: those that begin alike are neighbours."""

    @property
    def capacity(self) -> int:
        """Blocks that sequences can hold at the same time."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give out now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.capacity - self.num_free

    def grow(self, count: int) -> None:
        """Adds `count` free blocks, numbered after the present ones."""
        self._free = [*range(self.num_blocks + count - 1, self.num_blocks - 1, -1), *self._free]
        self._references += [0] * count
        self._keys += [None] * count
        self.num_blocks += count

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, tokens: NDArray[np.int64], num_blocks: int) -> list[int]:
        """The longest known prefix of `tokens`, at most `num_blocks` blocks. Takes no reference; pending blocks count."""
        blocks: list[int] = []
        if not self._share:
            return blocks
        parent = ROOT
        for index in range(num_blocks):
            block = self._tree.get((parent, self._content(tokens, index)))
            if block is None:
                break
            blocks.append(block)
            parent = block
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """Takes one reference on each block that `match` found."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def available_beside(self, matched: list[int]) -> int:
        """Blocks that stay free once `matched` is held."""
        return self.num_free - sum(self._references[block] == 0 for block in matched)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; evicts the longest unused cached content if it must."""
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} KV blocks wanted, {self.num_free} free")
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: list[int], owner: int) -> None:
        """Gives one reference on each block back. Pending blocks of `owner` become anyone's to compute."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._owners.get(block) == owner:
                self._owners[block] = -1
            if self._references[block]:
                continue
            if block in self._owners:
                self._forget(block)
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def announce(self, blocks: list[int], first: int, last: int, tokens: NDArray[np.int64], owner: int) -> None:
        """Enters `blocks[first:last]`, which hold a prefix of `tokens` nobody else has, as pending content of `owner`."""
        if not self._share:
            return
        for index in range(first, last):
            key = (blocks[index - 1] if index else ROOT, self._content(tokens, index))
            self._tree[key] = blocks[index]
            self._keys[blocks[index]] = key
            self._owners[blocks[index]] = owner

    def publish(self, blocks: list[int], index: int, tokens: NDArray[np.int64], owner: int) -> bool:
        """Enters `blocks[index]`, computed by `owner`, into the tree; the blocks before it must be there already.

        Where equal content is known, `blocks[index]` is replaced by it in place, and the duplicate freed. Returns False
        where that content is still pending elsewhere: the block stays private, and so must all that follow it.
        """
        if not self._share:
            return False
        block = blocks[index]
        key = (blocks[index - 1] if index else ROOT, self._content(tokens, index))
        known = self._tree.setdefault(key, block)
        if known == block:
            self._keys[block] = key
            self._computed.append(block)
            return True
        if known in self._owners:
            return False
        self.hold((known,))
        blocks[index] = known
        self.release([block], owner)
        return True

    def is_pending(self, block: int) -> bool:
        return block in self._owners

    def claim(self, block: int, owner: int) -> bool:
        """True where `owner` may compute the pending block: it is its own, or its first owner went away."""
        if self._owners[block] == -1:
            self._owners[block] = owner
        return self._owners[block] == owner

    def mark_computed(self, blocks: Iterable[int]) -> None:
        """Pending content is there (or will be by the end of the step that is being put together)."""
        for block in blocks:
            self._owners.pop(block, None)
            self._computed.append(block)

    def begin_step(self) -> None:
        """What was to be computed until now is there, and may be copied from."""
        for block in self._computed:
            key = self._keys[block]
            if key is not None and block not in self._owners:
                self._list(block, *key)
        self._computed.clear()

    def nearest(self, parent: int, tokens: NDArray[np.int64]) -> tuple[int, int]:
        """The block behind `parent` that begins most like `tokens` (a block's worth at most), and how many of them it begins with."""
        wanted = tokens.tobytes()
        alike = self._alike.get(parent, [])
        place = bisect_left(alike, (wanted, ROOT))
        # In sorted order nothing has more in common with a content than its neighbours.
        best, most = ROOT, 0
        for content, block in alike[max(place - 1, 0) : place + 1]:
            same = np.frombuffer(content, np.int64)[: len(tokens)] == tokens
            count = len(same) if same.all() else int(same.argmin())
            if count > most:
                best, most = block, count
        return best, most

    def forget(self, blocks: Iterable[int]) -> None:
        """What was to be computed was not: held blocks leave the tree, and nobody finds them any more."""
        for block in blocks:
            self._forget(block)

    def _content(self, tokens: NDArray[np.int64], index: int) -> bytes:
        return tokens[index * self.block_size : (index + 1) * self.block_size].tobytes()

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._tree[key]
            self._keys[block] = None
            self._unlist(block, *key)
        self._owners.pop(block, None)

    def _list(self, block: int, parent: int, content: bytes) -> None:
        alike = self._alike.setdefault(parent, [])
        place = bisect_left(alike, (content, block))
        if alike[place : place + 1] != [(content, block)]:
            alike.insert(place, (content, block))

    def _unlist(self, block: int, parent: int, content: bytes) -> None:
        alike = self._alike.get(parent, [])
        place = bisect_left(alike, (content, block))
        if alike[place : place + 1] == [(content, block)]:
            del alike[place]
            if not alike:
                del self._alike[parent]

    def check(self) -> None:
        """Raises AssertionError if the books do not balance. For tests and fault reports; linear in the pool."""
        held = [block for block in range(1, self.num_blocks) if self._references[block]]
        assert all(count >= 0 for count in self._references)
        assert len(self._free) + len(self._cached) + len(held) == self.capacity
        assert len(set(self._free) | set(self._cached) | set(held)) == self.capacity
        assert all(self._keys[block] == key for key, block in self._tree.items())
        assert sum(key is not None for key in self._keys) == len(self._tree)
        assert all(self._references[block] for block in self._owners), "a pending block that nobody holds"
        for (parent, _), block in self._tree.items():
            assert parent == ROOT or self._keys[parent] is not None, f"block {block} lost its parent {parent}"
            assert parent == ROOT or self._references[parent] >= self._references[block]
        for parent, alike in self._alike.items():
            assert alike == sorted(alike)
            assert all(self._tree.get((parent, content)) == block for content, block in alike), "a copy of what is not there"
