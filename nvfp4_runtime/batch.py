"""ForwardBatch: the tensors one step hands to the model. No hidden "current batch" anywhere."""

from __future__ import annotations

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


CacheLayer = KVLayer | LatentLayer


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
    max_query_len  the most new tokens of any sequence; 1: every sequence decodes
    max_seq_len    no seq_lens entry is larger

    The last two repeat, or bound, what the tensors say, for kernels whose launch depends on it: reading a tensor back
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
