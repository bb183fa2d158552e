"""A block pool that takes memory for its free blocks only when they are first used: a thousand replicas have many."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from nvfp4_runtime.cache.block_pool import BlockPool

_FIRST = 256


class GrowingPool(BlockPool):
    """Behaves as BlockPool(num_blocks): blocks that were never used are handed out before cached ones are forgotten."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(max(2, min(num_blocks, _FIRST)))
        self._limit = num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free) + self._limit - self.total

    def allocate(self, count: int) -> list[int]:
        assert 0 <= count <= self.num_free, f"asked for {count} blocks with {self.num_free} free"
        # what holds nothing is at the front: as many of the first `count` are free of charge
        unused = sum(1 for block in islice(self._free, count) if block not in self._hash_of)
        if count > unused and self.total < self._limit:
            self._grow(max(count - unused, self.total))
        return super().allocate(count)

    def _grow(self, count: int) -> None:
        """`count` more blocks, as far as the limit allows, before all others in the order of use."""
        first = len(self._refs)
        count = min(count, self._limit - self.total)
        self._refs.extend([0] * count)
        self.total += count
        fresh = OrderedDict((block, None) for block in range(first, first + count))
        fresh.update(self._free)
        self._free = fresh
