"""The block pool against its own invariants: under any sequence of calls, every block is accounted for."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nvfp4_runtime.cache.block_pool import BlockPool, chain_hash, salt_hash

KEY = b"k" * 32


class PoolMachine(RuleBasedStateMachine):
    """Random allocate, share, publish and release, with the owners kept beside."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=9)
        self.owners: list[list[int]] = []
        self.next_digest = 0

    @rule(count=st.integers(0, 8))
    def allocate(self, count: int) -> None:
        if count <= self.pool.num_free:
            self.owners.append(self.pool.allocate(count))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.owners) - 1))
        self.pool.release(self.owners.pop(index))

    @precondition(lambda self: any(self.owners))
    @rule(data=st.data(), digest=st.integers(0, 5))
    def publish(self, data: st.DataObject, digest: int) -> None:
        blocks = [b for owner in self.owners for b in owner]
        self.pool.publish(data.draw(st.sampled_from(blocks)), bytes([digest]))

    @rule(digests=st.lists(st.integers(0, 5), max_size=3))
    def share(self, digests: list[int]) -> None:
        found = self.pool.find(bytes([d]) for d in digests)
        found = list(dict.fromkeys(found))
        idle = self.pool.num_idle(found)
        before = self.pool.num_free
        self.pool.retain(found)
        assert before - self.pool.num_free == idle
        self.owners.append(found)

    @invariant()
    def everything_is_accounted_for(self) -> None:
        self.pool.check(self.owners)
        assert self.pool.num_free + self.pool.num_used == self.pool.total == 8


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_null_block_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0


def test_a_pool_without_a_usable_block_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 blocks"):
        BlockPool(1)


def test_released_published_block_is_found_again_until_it_is_reused() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.release([first, second])
    assert pool.find([b"a"]) == [first]
    pool.allocate(1)  # takes the unpublished one first
    assert pool.find([b"a"]) == [first]
    pool.allocate(1)
    assert pool.find([b"a"]) == []


def test_least_recently_used_cached_block_goes_first() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    for block, digest in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.publish(block, digest)
        pool.release([block])
    pool.retain(pool.find([b"a"]))
    pool.release([blocks[0]])  # used again, so b is now the oldest
    pool.allocate(1)
    assert pool.find([b"b"]) == []
    assert pool.find([b"a"]) == [blocks[0]]


def test_prefix_outlives_its_tail_when_one_request_is_released() -> None:
    pool = BlockPool(3)
    head, tail = pool.allocate(2)
    pool.publish(head, b"head")
    pool.publish(tail, b"tail")
    pool.release([head, tail])
    pool.allocate(1)
    assert pool.find([b"head", b"tail"]) == [head]


def test_find_stops_at_the_first_unknown_block() -> None:
    pool = BlockPool(4)
    a, _, c = pool.allocate(3)
    pool.publish(a, b"a")
    pool.publish(c, b"c")
    assert pool.find([b"a", b"b", b"c"]) == [a]


def test_hashes_depend_on_key_salt_parent_and_tokens() -> None:
    root = salt_hash(KEY, "")
    digests = {
        chain_hash(KEY, root, [1, 2]),
        chain_hash(KEY, root, [2, 1]),
        chain_hash(KEY, salt_hash(KEY, "tenant"), [1, 2]),
        chain_hash(b"x" * 32, root, [1, 2]),
        chain_hash(KEY, chain_hash(KEY, root, [0]), [1, 2]),
    }
    assert len(digests) == 5
    assert chain_hash(KEY, root, [1, 2]) == chain_hash(KEY, root, (1, 2))
