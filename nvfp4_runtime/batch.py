"""ForwardBatch: the tensors one step hands to the model. No hidden "current batch" anywhere."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVLayer:
    """One layer's paged keys and values.

    k, v      [num_blocks, H_kv, block_size, D]   bfloat16, float32 or float8_e4m3fn
              uint8 [.., D/2] for NVFP4           packed E2M1 codes, the even dimension in the low nibble
    k_scale   stored value * k_scale = key        1.0 unless the cache is FP8 or NVFP4 and the checkpoint stores one
    v_scale   likewise for values
    k_blocks  e4m3 [num_blocks, H_kv, block_size, D/16], NVFP4 only: key = code * block scale * k_scale
    v_blocks  likewise for values
    """

    k: Tensor
    v: Tensor
    k_scale: float = 1.0
    v_scale: float = 1.0
    k_blocks: Tensor | None = None
    v_blocks: Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.k.shape[2]

    @property
    def device(self) -> torch.device:
        return self.k.device


@dataclass(frozen=True)
class LatentLayer:
    """One layer's latent vectors (multi-head latent attention).

    latent  [num_blocks, block_size, kv_lora_rank + rope_dim]  bfloat16 or float32: normed latent, then the rotated key
    """

    latent: Tensor

    @property
    def block_size(self) -> int:
        return self.latent.shape[1]

    @property
    def device(self) -> torch.device:
        return self.latent.device


@dataclass(frozen=True)
class StateLayer:
    """One Mamba-2 layer's or delta net's states by slot: a running sequence has one, of whatever length. Slot 0 is
    nobody's.

    conv  float32 [num_slots, conv_width - 1, conv_dim]            the last inputs of the convolution, oldest first
    ssm   float32 [num_slots, num_heads, head_dim, state_size]
    """

    conv: Tensor
    ssm: Tensor

    @property
    def device(self) -> torch.device:
        return self.ssm.device


CacheLayer = KVLayer | LatentLayer | StateLayer


@dataclass(frozen=True)
class AdapterRows:
    """Which new tokens pass which LoRA adapter; the others pass none.

    rows     int64 [A]      their places in [0, T), sorted by adapter
    ids      int64 [A]      the adapter of each, by its place among the loaded ones
    offsets  int32 [N + 1]  rows[offsets[i]:offsets[i + 1]] are adapter i's, of N loaded ones
    places   int64 [T]      where each token is in `rows`; A where it is not
    whole    every token has an adapter and `rows` is 0, 1, 2, ...: nothing has to be moved
    """

    rows: Tensor
    ids: Tensor
    offsets: Tensor
    places: Tensor
    whole: bool

    @classmethod
    def of(cls, per_token: Sequence[int], num_adapters: int, device: torch.device) -> AdapterRows | None:
        """From each token's adapter, -1 for none. None where no token has one."""
        tokens = [i for i, adapter in enumerate(per_token) if adapter >= 0]
        if not tokens:
            return None
        rows = sorted(tokens, key=per_token.__getitem__)  # stable: tokens of one adapter stay in their order
        places = [len(rows)] * len(per_token)
        for place, row in enumerate(rows):
            places[row] = place
        ids = [per_token[row] for row in rows]
        offsets = [bisect_left(ids, adapter) for adapter in range(num_adapters + 1)]
        int64 = [torch.tensor(values, device=device) for values in (rows, ids, places)]
        bounds = torch.tensor(offsets, dtype=torch.int32, device=device)
        return cls(int64[0], int64[1], bounds, int64[2], rows == list(range(len(per_token))))

    def pick(self, x: Tensor) -> Tensor:
        """The rows of x [T, K] that pass an adapter, [A, K], sorted by it."""
        return x if self.whole else x.index_select(0, self.rows)

    def put_back(self, y: Tensor) -> Tensor:
        """y [A, N] -> [T, N], zeros for the tokens without."""
        return y if self.whole else torch.cat([y, y.new_zeros(1, y.shape[1])]).index_select(0, self.places)


@dataclass(frozen=True)
class ForwardBatch:
    """One ragged step: B sequences give T new tokens in all, prompt parts and decodes alike.

    input_ids      int64 [T]
    positions      int64 [T]              position of each new token in its sequence
    slot_mapping   int64 [T]              block_id * block_size + offset where its K and V go
    block_tables   int32 [B, max_blocks]  block ids in order; unused entries 0 (the null block)
    seq_lens       int32 [B]              tokens visible to attention, the new ones included
    cu_seqlens_q   int32 [B + 1]          prefix sum of new tokens per sequence
    logits_rows    int64 [R]              rows of [0, T) whose logits are wanted
    kv             one CacheLayer per decoder layer
    state_slots    int64 [B]              each sequence's slot in every StateLayer; None for models without. A sequence
                                          whose first new token has position 0 begins with zeros there
    adapters       None: no token passes an adapter
    max_query_len  the most new tokens of any sequence; 1: every sequence decodes
    max_seq_len    no seq_lens entry is larger

    The two maxima repeat, or bound, what the tensors say, for kernels whose launch depends on it: reading a tensor back
    from a GPU would wait for all that runs there. None: the tensors have to be read.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    logits_rows: Tensor
    kv: tuple[CacheLayer, ...]
    max_query_len: int | None = None
    max_seq_len: int | None = None
    adapters: AdapterRows | None = None
    state_slots: Tensor | None = None

    @cached_property
    def sequence_of_token(self) -> Tensor:
        """int64 [T]: the place in the batch of each new token's sequence."""
        counts = self.cu_seqlens_q.diff()
        sequences = torch.arange(len(counts), device=counts.device)
        return sequences.repeat_interleave(counts, output_size=len(self.positions))

    def kv_layer(self, layer_id: int) -> KVLayer:
        """The keys and values of a layer that keeps them."""
        layer = self.kv[layer_id]
        assert isinstance(layer, KVLayer)
        return layer

    @cached_property
    def each_token(self) -> tuple[Tensor, Tensor]:
        """(block_tables, seq_lens) as if every new token were a sequence of its own, that ends with it.

        int32 [T, max_blocks] and int32 [T]. Where every sequence decodes these are the batch's own.
        """
        if self.max_query_len == 1:
            return self.block_tables, self.seq_lens
        counts = self.cu_seqlens_q.diff()
        tables = self.block_tables.repeat_interleave(counts, dim=0, output_size=len(self.input_ids))
        return tables, (self.positions + 1).to(torch.int32)
