"""Latent attention over long parts of prompts: keys and values of every head, expanded from the latent vectors.

Absorbed attention (mla.py) multiplies kv_lora_rank + rope_dim values per pair of tokens and kv_lora_rank to sum them;
expanded, a head has nope_dim + rope_dim and v_dim. That pays once a sequence has some tokens to share the expansion of
all that came before, cached latent vectors of earlier parts included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.config import KVDtype, MLAConfig
from nvfp4_runtime.kernels.ops import PagedAttentionSpec
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.nvfp4.weight import DenseWeight

FEWEST = 64  # new tokens of a sequence; fewer are absorbed
_TOGETHER = 8  # heads expanded at a time: 8 x 2 x 192 values of 16 bits are 6 KiB a token


class ExpandedAttention:
    """One layer's. `heads` [H, nope_dim + v_dim, rank]: kv_b_proj, a matrix per head.

    Its results are those of absorbed attention but for rounding: expanded keys and values are rounded to the type of
    activations, absorbed ones never exist.
    """

    def __init__(self, kernels: Kernels, config: MLAConfig, heads: Tensor) -> None:
        self.config = config
        self.dtype: torch.dtype = getattr(torch, kernels.dtype)
        self.num_heads = heads.shape[0]
        self.group = next(size for size in range(min(_TOGETHER, self.num_heads), 0, -1) if self.num_heads % size == 0)
        self.dim = max(config.nope_dim + config.rope_dim, config.v_dim)
        self.expand = [
            kernels.linear("kv_b_proj.prompts", DenseWeight(part.flatten(0, 1)), out_dtype=kernels.dtype, counted=False)
            for part in torch.split(heads, self.group)
        ]
        assert kernels.dtype != "float16"  # no backend takes it
        cache: KVDtype = kernels.dtype
        self.attend = kernels.paged_attention(
            PagedAttentionSpec(self.group, self.group, self.dim, None, cache, kernels.dtype, kernels.dtype)
        )

    def __call__(self, q: Tensor, latents: Tensor) -> Tensor:
        """One sequence's new tokens, which end it -> [T, H, v_dim].

        q        [T, H, nope_dim + rope_dim], rotated, of the activations' type
        latents  [L, rank + rope_dim]: what the cache holds of all its tokens, the new ones included
        """
        config, (count, length) = self.config, (len(q), len(latents))
        batch = _one_sequence(count, length)
        latent = latents[:, : config.kv_lora_rank].contiguous()
        key = latents[:, config.kv_lora_rank :]
        shape = (1, self.group, length, self.dim)  # one block holds them all
        k, v = torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)
        width = config.nope_dim + config.rope_dim
        k[..., config.nope_dim : width] = key
        out = []
        for i, expand in enumerate(self.expand):
            each = expand(latent).view(length, self.group, -1).transpose(0, 1)
            k[0, ..., : config.nope_dim] = each[..., : config.nope_dim]
            v[0, ..., : config.v_dim] = each[..., config.nope_dim :]
            queries = torch.zeros(count, self.group, self.dim, dtype=self.dtype)
            queries[..., :width] = q[:, i * self.group : (i + 1) * self.group]
            found = self.attend(queries, KVLayer(k, v), batch, config.scale)
            out.append(found.view(count, self.group, self.dim)[..., : config.v_dim])
        return torch.cat(out, dim=1)


def _one_sequence(count: int, length: int) -> ForwardBatch:
    """A batch of `count` tokens that end a sequence of `length`, in the only block of a cache."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return ForwardBatch(
        input_ids=nothing,
        positions=torch.arange(length - count, length),
        slot_mapping=nothing,
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32),
        logits_rows=nothing,
        kv=(),
        max_query_len=count,
        max_seq_len=length,
    )
