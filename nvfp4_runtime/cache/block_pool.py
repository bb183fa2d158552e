"""The block pool: reference counts, an LRU free list, and full blocks found again by chained hash. Pure Python.

Block 0 is the null block: it pads block tables and is never handed out, so `total` is num_blocks - 1. A block whose
count is 0 is free; if it was published it still holds its tokens' KV and can be found again until it is reused.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

NULL_BLOCK = 0


def chain_hash(key: bytes, parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a full block given its parent's hash: keyed, so that no client can aim at a collision.

    The first block's parent is `salt_hash`.
    """
    return hashlib.blake2b(parent + struct.pack(f"<{len(tokens)}q", *tokens), digest_size=16, key=key).digest()


def salt_hash(key: bytes, salt: str, adapter: str = "") -> bytes:
    """The parent of a first block. Different salts, or different LoRA adapters, never share blocks."""
    parts = [part.encode() for part in (salt, adapter)]
    return hashlib.blake2b(b"".join(len(p).to_bytes(8, "little") + p for p in parts), digest_size=16, key=key).digest()


class BlockPool:
    """Hands out block ids and takes them back.

    `free + used == total` holds between calls; `check` proves it together with the reference counts.

    on_forget  called with the hash of a block that is not found any more
    on_reset   called when none is
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a block pool needs at least 2 blocks (block 0 is the null block), got {num_blocks}")
        self.total = num_blocks - 1
        self._refs = [0] * num_blocks
        self.on_forget: Callable[[bytes], None] | None = None
        self.on_reset: Callable[[], None] | None = None
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # Least recently freed first. Unpublished blocks go to the front: losing them loses nothing.
        self._free: OrderedDict[int, None] = OrderedDict((i, None) for i in range(1, num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.total - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, forgetting the least recently used cached ones. The caller has checked `num_free`."""
        assert 0 <= count <= len(self._free), f"asked for {count} blocks with {len(self._free)} free"
        taken = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            self._forget(block)
            self._refs[block] = 1
            taken.append(block)
        return taken

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix of `hashes`. Nothing is retained yet."""
        found = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are free now, and so would leave the free list if retained."""
        return sum(1 for block in blocks if self._refs[block] == 0)

    def retain(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block found by `find`."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a request, last block first, so that prefixes outlive their tails."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} released more often than retained"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, digest: bytes) -> bool:
        """Make a full, computed block findable. If its content is known already, the older block stays the answer.

        Returns whether it could not be found before.
        """
        assert self._refs[block] > 0, f"block {block} published without an owner"
        if digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest
            return True
        return False

    def unpublish(self, blocks: Iterable[int]) -> None:
        """Nobody finds these blocks any more; who holds them keeps them."""
        for block in blocks:
            self._forget(block)

    def reset(self) -> None:
        """Every block free, nothing findable, whatever was before."""
        self._refs = [0] * len(self._refs)
        self._hash_of.clear()
        self._block_of.clear()
        self._free = OrderedDict((i, None) for i in range(1, len(self._refs)))
        if self.on_reset is not None:
            self.on_reset()

    def _forget(self, block: int) -> None:
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
            if self.on_forget is not None:
                self.on_forget(digest)

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Assert every invariant, given the block lists of all live requests. For tests and fault injection."""
        counted = [0] * len(self._refs)
        for blocks in owners:
            for block in blocks:
                counted[block] += 1
        assert counted == self._refs, "reference counts differ from what requests hold"
        assert counted[NULL_BLOCK] == 0, "the null block was handed out"
        used = sum(1 for refs in counted if refs)
        assert used + len(self._free) == self.total, f"{used} used + {len(self._free)} free != {self.total}"
        assert all(counted[block] == 0 for block in self._free), "a block is free and referenced"
        assert {b: h for h, b in self._block_of.items()} == self._hash_of, "hash maps disagree"
