"""The gated delta net: projections to queries, keys, values and gates; convolution and delta rule over states; a norm
of each head, gated; output projection."""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, StateLayer
from nvfp4_runtime.cache.specs import StateSpec
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import DeltaConfig
from nvfp4_runtime.kernels.ops import DeltaSpec, DeltaWeights
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.layers.linear import Linear


class GatedDeltaNet:
    """One layer's net, `prefix` being e.g. "model.layers.3.linear_attn".

    cache_index  the place of its states in batch.kv
    """

    def __init__(
        self,
        ckpt: Checkpoint,
        kernels: Kernels,
        config: DeltaConfig,
        hidden: int,
        eps: float,
        prefix: str,
        cache_index: int,
    ) -> None:
        self.config, self.eps, self.cache_index = config, eps, cache_index
        self.dtype: torch.dtype = getattr(torch, kernels.dtype)
        heads, conv_dim = config.num_value_heads, 2 * config.keys + config.values
        self.widths = [conv_dim, config.values, heads, heads]
        names, sizes = ["qkv", "z", "b", "a"], self.widths
        if config.joined:
            names, sizes = ["qkvz", "ba"], [conv_dim + config.values, 2 * heads]
        prefixes = [f"{prefix}.in_proj_{name}" for name in names]
        self.in_proj = Linear.fused(ckpt, kernels, "in_proj", prefixes, sizes, hidden)
        self.out_proj = Linear.single(ckpt, kernels, f"{prefix}.out_proj", hidden, config.values)

        def plain(name: str, *shape: int) -> Tensor:
            return kernels.place(ckpt.tensor(f"{prefix}.{name}", shape).to(torch.float32).contiguous())

        self.weights = DeltaWeights(
            conv_weight=plain("conv1d.weight", conv_dim, 1, config.conv_width).squeeze(1),
            a=-plain("A_log", heads).exp(),
            dt_bias=plain("dt_bias", heads),
        )
        self.norm = plain("norm.weight", config.value_dim)
        self.rule = kernels.gated_delta(
            DeltaSpec(config.num_key_heads, heads, config.key_dim, config.value_dim, config.conv_width, kernels.stream)
        )

    @property
    def spec(self) -> StateSpec:
        config, conv_dim = self.config, self.widths[0]
        return StateSpec(config.num_value_heads, config.value_dim, config.key_dim, conv_dim, config.conv_width)

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; the sequences' states are afterwards as their last tokens leave them."""
        state = batch.kv[self.cache_index]
        assert isinstance(state, StateLayer)
        projected = self.in_proj(x, batch.adapters)
        if self.config.joined:
            qkv, z, b, a = self._by_kind(projected)
        else:
            qkv, z, b, a = torch.split(projected, self.widths, dim=-1)
        y = self.rule(qkv.contiguous(), b.contiguous(), a.contiguous(), self.weights, state, batch)
        return self.out_proj(self._gated_norm(y, z), batch.adapters)

    def _by_kind(self, projected: Tensor) -> list[Tensor]:
        """qkv, z, b, a of rows that go key head by key head, each with what belongs to its value heads."""
        config, count = self.config, len(projected)
        each = config.num_value_heads // config.num_key_heads
        joined, pairs = torch.split(projected, [self.widths[0] + self.widths[1], 2 * config.num_value_heads], dim=-1)
        sizes = [config.key_dim, config.key_dim, each * config.value_dim, each * config.value_dim]
        q, k, v, z = torch.split(joined.reshape(count, config.num_key_heads, sum(sizes)), sizes, dim=-1)
        b, a = torch.split(pairs.reshape(count, config.num_key_heads, 2 * each), [each, each], dim=-1)
        qkv = torch.cat([part.reshape(count, -1) for part in (q, k, v)], dim=-1)
        return [qkv, *(part.reshape(count, -1) for part in (z, b, a))]

    def _gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """RMSNorm of each head of y, times silu(z), FP32 inside; [T, values] of the activations' type."""
        heads = y.view(len(y), -1, self.config.value_dim)
        normed = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + self.eps) * self.norm
        return (normed.flatten(1) * torch.nn.functional.silu(z.to(torch.float32))).to(self.dtype)
