"""What a GPU does for the runner, done by the CPU: the same order, the same fixed memory, and a lag that tests choose.

HashModel is a model for it whose every logit is exact and depends on all tokens of its sequence as they lie in the KV
cache: a wrong slot, table, position or fed token changes everything after it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer

_PRIME = 1_000_003


class TwinDevice:
    """See `Device`. lag: "none" does work at once, "most" when somebody waits for it, "random" some time between."""

    torch_device = torch.device("cpu")

    def __init__(self, lag: str = "none", seed: int = 0) -> None:
        self._lag = lag
        self._random = random.Random(seed)
        self._queue: deque[Callable[[], None]] = deque()
        self.num_captured = 0
        self.num_replayed = 0

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def submit(self, work: Callable[[], None]) -> None:
        self._queue.append(work)
        if self._lag == "none":
            self._do(len(self._queue))
        elif self._lag == "random":
            self._do(self._random.randint(0, len(self._queue)))

    def mark(self) -> Callable[[], None]:
        done = False

        def reached() -> None:
            nonlocal done
            done = True

        def wait() -> None:
            while not done:
                self._do(1)

        self._queue.append(reached)
        return wait

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1

        def replay() -> None:
            self.num_replayed += 1
            work()

        return replay

    def _do(self, count: int) -> None:
        for _ in range(count):
            self._queue.popleft()()


class HashModel:
    """Logits of a token from a hash of its sequence up to there, read from the cache.

    poison  a last token after which no logit is a number
    """

    def __init__(self, vocab_size: int, poison: int = -1) -> None:
        self.vocab_size = vocab_size
        self.poison = poison
        self.num_forwards = 0

    def cache(self, num_blocks: int, block_size: int) -> tuple[KVLayer, ...]:
        shape = (num_blocks, 1, block_size, 1)
        return (KVLayer(torch.full(shape, -1.0), torch.full(shape, -1.0)),)

    def forward(self, batch: ForwardBatch) -> Tensor:
        self.num_forwards += 1
        assert batch.max_query_len is not None
        assert batch.max_seq_len is not None
        counts = batch.cu_seqlens_q.diff()
        assert int(counts.max()) <= batch.max_query_len
        assert int(batch.seq_lens.max()) <= batch.max_seq_len
        size = batch.kv[0].block_size
        memory = batch.kv[0].k.view(-1)
        memory[batch.slot_mapping] = batch.input_ids.float()
        rows = batch.logits_rows
        sequence = torch.searchsorted(batch.cu_seqlens_q[1:].contiguous(), rows.int(), right=True)
        length = batch.positions[rows] + 1
        assert bool((length <= batch.seq_lens[sequence]).all())
        if len(rows) == 0:  # a chunk of a prompt
            return torch.zeros(0, self.vocab_size)
        places = torch.arange(int(length.max()))
        blocks = batch.block_tables[sequence][:, places // size].long()
        tokens = memory[blocks * size + places % size].long()
        visible = places < length.unsqueeze(1)
        weights = (places * 7919 + 104_729) % _PRIME
        digest = ((tokens + 1) * weights % _PRIME * visible).sum(1) % _PRIME
        mixed = (digest.unsqueeze(1) * 31 + torch.arange(self.vocab_size) * 65_537) % _PRIME
        logits = (mixed * mixed % _PRIME).float() * (8.0 / _PRIME)
        last = batch.input_ids[rows]
        return torch.where((last == self.poison).unsqueeze(1), torch.nan, logits)
