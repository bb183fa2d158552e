"""Which of several engines a request goes to: where the least has to be computed before its first token. Torch-free.

For each engine that is what waits there already, what the prompt has that the engine's prefix cache has not, and an
allowance for the requests it works on. The caches are not asked: this remembers, for each engine, the blocks of the
prompts that were sent there, as many as its cache holds, the least recently used forgotten first.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from nvfp4_runtime.cache.block_pool import chain_hash, salt_hash

# What a request under way delays a new one by, in prompt tokens: it brings a token to each of the coming steps.
REQUEST_TOKENS = 32


@dataclass(frozen=True)
class Load:
    """What an engine has to do.

    requests  running or waiting
    tokens    prompt tokens of those that have not begun to answer
    """

    requests: int
    tokens: int


@dataclass
class Memory:
    """Blocks that one engine's cache should hold, by hash; the last one was used last."""

    capacity: int
    blocks: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def matching(self, hashes: Sequence[bytes]) -> int:
        """How many of the first blocks are there."""
        return next((i for i, digest in enumerate(hashes) if digest not in self.blocks), len(hashes))

    def note(self, hashes: Sequence[bytes]) -> None:
        for digest in reversed(hashes):  # a prefix outlives what follows it
            self.blocks[digest] = None
            self.blocks.move_to_end(digest)
        while len(self.blocks) > self.capacity:
            self.blocks.popitem(last=False)


class Router:
    """num_matched, num_tokens  prompt tokens that were sent to where they should be cached, of all that were sent"""

    def __init__(self, capacities: Sequence[int], block_size: int, remembers: bool = True) -> None:
        """capacities: blocks of each engine's cache. `remembers` False: engines keep no prefixes, only load counts."""
        self._memories = [Memory(capacity) for capacity in capacities]
        self._block_size = block_size
        self._remembers = remembers
        self._key = secrets.token_bytes(32)
        self._turn = 0
        self.num_matched = 0
        self.num_tokens = 0

    def hashes(self, tokens: Sequence[int], salt: str, adapter: str) -> list[bytes]:
        """Of the prompt's full blocks but the last token's, which is always computed."""
        if not self._remembers:
            return []
        size, found = self._block_size, [salt_hash(self._key, salt, adapter)]
        for start in range(0, (len(tokens) - 1) // size * size, size):
            found.append(chain_hash(self._key, found[-1], tokens[start : start + size]))
        return found[1:]

    def ranked(self, num_tokens: int, hashes: Sequence[bytes], loads: Sequence[Load | None]) -> list[int]:
        """Engines from the best on; None: out of service. Equals take turns."""
        self._turn += 1
        count = len(loads)
        costs: list[tuple[int, int, int]] = []
        for i, load in enumerate(loads):
            if load is not None:
                missing = num_tokens - self._block_size * self._memories[i].matching(hashes)
                cost = load.tokens + missing + REQUEST_TOKENS * load.requests
                costs.append((cost, (i - self._turn) % count, i))
        return [i for _, _, i in sorted(costs)]

    def sent(self, engine: int, num_tokens: int, hashes: Sequence[bytes]) -> None:
        self.num_matched += self._block_size * self._memories[engine].matching(hashes)
        self.num_tokens += num_tokens
        self._memories[engine].note(hashes)

    def forget(self, engine: int) -> None:
        """Its cache is empty: another engine has taken its place."""
        self._memories[engine].blocks.clear()
