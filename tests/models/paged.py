"""Runs a model over a paged cache without an engine: block tables, slots and batches, in deliberately awkward order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.batch import CacheLayer, ForwardBatch
from nvfp4_runtime.cache.paged_kv import allocate
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import Dtype, KVDtype, Numerics
from nvfp4_runtime.errors import NoBackendError
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.models import load_model
from nvfp4_runtime.models.llama import Decoder

BACKENDS = ("reference", "cpu")


def load_or_skip(
    path: object,
    backend: str = "reference",
    dtype: Dtype = "float32",
    numerics: Numerics = "w4a16",
    kv_dtype: KVDtype = "float32",
) -> Decoder:
    """The model at `path` on one backend; a native backend that refuses skips the test with its own reason."""
    kernels = Kernels(available_backends(backend), dtype, numerics)
    try:
        return load_model(Checkpoint.open(str(path)), kernels, kv_dtype)
    except NoBackendError as error:
        if backend == "reference":
            raise
        pytest.skip(str(error))


class PagedRunner:
    """Sequences by id over one cache. Blocks are handed out from a shuffled list, so neighbours are never adjacent."""

    def __init__(self, model: Decoder, block_size: int = 16, num_blocks: int = 64, seed: int = 0) -> None:
        self.model = model
        self.block_size = block_size
        device = torch.device("cpu")
        self.kv: tuple[CacheLayer, ...] = allocate(
            model.kv_specs, model.kv_dtype, num_blocks, block_size, device, num_slots=32
        )
        # block 0 is the null block
        shuffled = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(seed)) + 1
        self.free: list[int] = shuffled.tolist()
        self.tables: dict[int, list[int]] = {}
        self.lens: dict[int, int] = {}

    def batch(
        self, pieces: Sequence[tuple[int, Sequence[int]]], logits_rows: Sequence[int] | None = None
    ) -> ForwardBatch:
        """New tokens per sequence id, in this order; logits of every row unless `logits_rows` says which."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        bounds = [0]
        for seq, tokens in pieces:
            table, start = self.tables.setdefault(seq, []), self.lens.get(seq, 0)
            for p in range(start, start + len(tokens)):
                if p // self.block_size == len(table):
                    table.append(self.free.pop())
                positions.append(p)
                slots.append(table[p // self.block_size] * self.block_size + p % self.block_size)
            ids += tokens
            self.lens[seq] = start + len(tokens)
            bounds.append(len(ids))
        width = max(len(self.tables[seq]) for seq, _ in pieces)
        tables = [self.tables[seq] + [0] * (width - len(self.tables[seq])) for seq, _ in pieces]
        return ForwardBatch(
            input_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            seq_lens=torch.tensor([self.lens[seq] for seq, _ in pieces], dtype=torch.int32),
            cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32),
            logits_rows=torch.tensor(range(len(ids)) if logits_rows is None else logits_rows, dtype=torch.int64),
            kv=self.kv,
            max_query_len=max(len(tokens) for _, tokens in pieces),
            state_slots=torch.tensor([1 + seq for seq, _ in pieces]),
        )

    def run(self, *pieces: tuple[int, Sequence[int]]) -> list[Tensor]:
        """Logits [new tokens, vocab] of each piece."""
        logits = self.model.forward(self.batch(pieces))
        return list(torch.split(logits, [len(tokens) for _, tokens in pieces]))

    def greedy(self, seq: int, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Argmax tokens after `prompt`, one step each."""
        out: list[int] = []
        step = list(prompt)
        for _ in range(num_tokens):
            out.append(int(self.run((seq, step))[0][-1].argmax()))
            step = [out[-1]]
        return out
