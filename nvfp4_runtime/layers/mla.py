"""Multi-head latent attention (DeepSeek): one short latent vector a token serves all heads, as keys and as values.

The two halves of kv_b_proj are absorbed: queries are brought into the latent space, attention runs there, and its
result is brought out again. So the cache holds kv_lora_rank + rope_dim values a token, whatever the number of heads.
Long parts of prompts take the other way round on CPUs: mla_prompt.py.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, LatentLayer
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import MLAConfig
from nvfp4_runtime.kernels.ops import GroupedLinearKernel, MLASpec
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.kernels.whole_ops import LatentBodyOps, LatentOps
from nvfp4_runtime.layers.linear import Linear, load_weight
from nvfp4_runtime.layers.mla_prompt import FEWEST, ExpandedAttention
from nvfp4_runtime.layers.norm import RMSNorm
from nvfp4_runtime.nvfp4.weight import DenseWeight, Weight

_INNER_NORM_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm, whatever config.json says of the other norms


class LatentAttention:
    """One layer's attention, `prefix` being e.g. "model.layers.3.self_attn".

    cos, sin  the rope tables of rope_dim, shared by all layers
    """

    def __init__(
        self,
        ckpt: Checkpoint,
        kernels: Kernels,
        config: MLAConfig,
        hidden: int,
        num_heads: int,
        prefix: str,
        layer_id: int,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        self.config, self.num_heads, self.layer_id = config, num_heads, layer_id
        self.cos, self.sin = cos, sin
        self.dtype: torch.dtype = getattr(torch, kernels.dtype)
        rank, rope, q_rank = config.kv_lora_rank, config.rope_dim, config.q_lora_rank
        queries = num_heads * (config.nope_dim + rope)
        self.q_norm: RMSNorm | None = None
        if q_rank is not None:
            self.q_norm = RMSNorm(ckpt, kernels, f"{prefix}.q_a_layernorm", q_rank, _INNER_NORM_EPS)
            self.q_b_proj = Linear.single(ckpt, kernels, f"{prefix}.q_b_proj", queries, q_rank)
        names = [f"{prefix}.{'q_proj' if q_rank is None else 'q_a_proj'}", f"{prefix}.kv_a_proj_with_mqa"]
        self.widths = [queries if q_rank is None else q_rank, rank, rope]
        self.down_proj = Linear.fused(ckpt, kernels, "q_kv_a_proj", names, [self.widths[0], rank + rope], hidden)
        self.kv_norm = RMSNorm(ckpt, kernels, f"{prefix}.kv_a_layernorm", rank, _INNER_NORM_EPS)
        rows = num_heads * (config.nope_dim + config.v_dim)
        matrices = _plain(load_weight(ckpt, f"{prefix}.kv_b_proj", rows, rank, bias=False)).view(num_heads, -1, rank)
        self.into_latent, self.out_of_latent = _absorbed(kernels, config, matrices)
        self.expanded = ExpandedAttention(kernels, config, matrices) if kernels.device.type == "cpu" else None
        self.heads = kernels.place(torch.arange(num_heads + 1, dtype=torch.int32))
        self.o_proj = Linear.single(ckpt, kernels, f"{prefix}.o_proj", hidden, num_heads * config.v_dim)
        self.attend = kernels.mla_decode(MLASpec(num_heads, rank, rope, kernels.dtype, kernels.dtype))
        self.run_as_one = kernels.latent(self._latent_ops())

    def ops(self) -> LatentBodyOps:
        """The same, while every sequence decodes, for a backend that runs a decoder as one call."""
        return LatentBodyOps(self.down_proj.only_kernel, self.run_as_one, self.o_proj.only_kernel, self.layer_id)

    def _latent_ops(self) -> LatentOps:
        q_norm = None if self.q_norm is None else self.q_norm.op
        return LatentOps(
            config=self.config,
            num_heads=self.num_heads,
            q_norm=q_norm,
            q_b=None if q_norm is None else self.q_b_proj.only_kernel,
            kv_norm=self.kv_norm.op,
            keys=self.into_latent,
            values=self.out_of_latent,
            attend=self.attend,
            cos=self.cos,
            sin=self.sin,
        )

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; the new tokens' latent vectors are in the cache afterwards."""
        cache, num_tokens = batch.kv[self.layer_id], x.shape[0]
        assert isinstance(cache, LatentLayer)
        projected = self.down_proj(x, batch.adapters)
        long = [] if self.expanded is None else long_parts(batch)
        if self.run_as_one is not None and batch.adapters is None and not long:
            return self.o_proj(self.run_as_one(projected, cache, batch), None)
        q, latent, key = torch.split(projected, self.widths, dim=-1)
        if self.q_norm is not None:
            q = self.q_b_proj(self.q_norm(q.contiguous(), None)[0], batch.adapters)
        per_head = q.view(num_tokens, self.num_heads, -1)
        q_nope, q_rope = torch.split(per_head, [self.config.nope_dim, self.config.rope_dim], dim=-1)
        turned = self._turn(torch.cat([q_rope, key.unsqueeze(1)], dim=1), batch.positions).to(self.dtype)
        latent = self.kv_norm(latent.contiguous(), None)[0]
        cache.latent.flatten(0, 1)[batch.slot_mapping] = torch.cat([latent, turned[:, -1]], dim=-1)
        q_nope, q_rope = q_nope.to(self.dtype), turned[:, :-1]
        if not long:
            out = self._absorb(q_nope, q_rope, cache, *batch.each_token)
        else:
            out = self._in_parts(q_nope, q_rope, cache, batch, long)
        return self.o_proj(out.flatten(1), batch.adapters)

    def _absorb(self, q_nope: Tensor, q_rope: Tensor, cache: LatentLayer, tables: Tensor, lengths: Tensor) -> Tensor:
        """[T, H, nope_dim] and [T, H, rope_dim], with a table and a length for each token -> [T, H, v_dim]."""
        seen = self._by_head(self.into_latent, q_nope).to(self.dtype)
        out = self.attend(
            seen, q_rope.contiguous(), cache.latent, tables.contiguous(), lengths.contiguous(), self.config.scale
        )
        return self._by_head(self.out_of_latent, out).to(self.dtype)

    def _in_parts(
        self, q_nope: Tensor, q_rope: Tensor, cache: LatentLayer, batch: ForwardBatch, long: list[tuple[int, int, int]]
    ) -> Tensor:
        """The `long` sequences expanded, one after another; all other tokens absorbed, together."""
        assert self.expanded is not None
        out = torch.empty(*q_nope.shape[:2], self.config.v_dim, dtype=self.dtype)
        rest = torch.ones(len(q_nope), dtype=torch.bool)
        for sequence, start, stop in long:
            length = int(batch.seq_lens[sequence])
            blocks = batch.block_tables[sequence, : -(-length // cache.block_size)].to(torch.int64)
            latents = cache.latent[blocks].flatten(0, 1)[:length]
            q = torch.cat([q_nope[start:stop], q_rope[start:stop]], dim=-1)
            out[start:stop] = self.expanded(q, latents)
            rest[start:stop] = False
        if rows := rest.nonzero().flatten().tolist():
            tables, lengths = batch.each_token
            out[rows] = self._absorb(q_nope[rows], q_rope[rows], cache, tables[rows], lengths[rows])
        return out

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of [T, H, rope_dim]; what were neighbours come out as halves, for queries and keys alike."""
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        first, second = (x[..., 0::2], x[..., 1::2]) if self.config.interleaved else x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _by_head(self, kernel: GroupedLinearKernel, x: Tensor) -> Tensor:
        """Each head's own matrix: [T, H, K] -> [T, H, N], contiguous. Heads are to the kernel what experts are."""
        num_tokens, num_heads, k = x.shape
        rows = x.transpose(0, 1).reshape(num_heads * num_tokens, k).contiguous()
        y = kernel(rows, self.heads * num_tokens)
        return y.view(num_heads, num_tokens, y.shape[-1]).transpose(0, 1).contiguous()


def long_parts(batch: ForwardBatch) -> list[tuple[int, int, int]]:
    """(sequence, first row, end of its rows) of the sequences with many new tokens."""
    if batch.max_query_len is not None and batch.max_query_len < FEWEST:
        return []
    bounds = batch.cu_seqlens_q.tolist()
    return [(i, a, b) for i, (a, b) in enumerate(pairwise(bounds)) if b - a >= FEWEST]


def _absorbed(kernels: Kernels, config: MLAConfig, heads: Tensor) -> tuple[GroupedLinearKernel, GroupedLinearKernel]:
    """kv_b_proj [H, nope + v, rank] as a matrix per head from nope to rank, and one from rank to v.

    A quantised one is used as the float32 values it stands for: transposed, its blocks would lie across the sums.
    """
    keys: list[Weight] = [DenseWeight(head[: config.nope_dim].t().contiguous()) for head in heads]
    values: list[Weight] = [DenseWeight(head[config.nope_dim :].contiguous()) for head in heads]
    return kernels.grouped_linear("kv_b_proj.k", keys), kernels.grouped_linear("kv_b_proj.v", values)


def _plain(weight: Weight) -> Tensor:
    return weight.weight if isinstance(weight, DenseWeight) else weight.dequantize()
