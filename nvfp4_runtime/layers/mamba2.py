"""The Mamba-2 mixer: projection to gate, convolved inputs and steps; selective scan; gated group norm; projection."""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, StateLayer
from nvfp4_runtime.cache.specs import StateSpec
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import Mamba2Config
from nvfp4_runtime.kernels.ops import Mamba2Spec, Mamba2Weights
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.kernels.whole_ops import MambaOps
from nvfp4_runtime.layers.linear import Linear


class Mamba2:
    """One layer's mixer, `prefix` being e.g. "backbone.layers.3.mixer".

    cache_index  the place of its states in batch.kv
    """

    def __init__(
        self,
        ckpt: Checkpoint,
        kernels: Kernels,
        config: Mamba2Config,
        hidden: int,
        eps: float,
        prefix: str,
        cache_index: int,
    ) -> None:
        self.config, self.cache_index = config, cache_index
        spec = Mamba2Spec(
            config.num_heads,
            config.head_dim,
            config.state_size,
            config.num_groups,
            config.conv_width,
            kernels.stream,
            kernels.dtype,
        )
        self.in_proj = Linear.single(ckpt, kernels, f"{prefix}.in_proj", sum(spec.widths), hidden)
        self.out_proj = Linear.single(ckpt, kernels, f"{prefix}.out_proj", hidden, config.inner)

        def plain(name: str, *shape: int) -> Tensor:
            return kernels.place(ckpt.tensor(f"{prefix}.{name}", shape).to(torch.float32).contiguous())

        self.weights = Mamba2Weights(
            conv_weight=plain("conv1d.weight", config.conv_dim, 1, config.conv_width).squeeze(1),
            conv_bias=plain("conv1d.bias", config.conv_dim),
            a=-plain("A_log", config.num_heads).exp(),
            dt_bias=plain("dt_bias", config.num_heads),
            d=plain("D", config.num_heads),
            norm=plain("norm.weight", config.inner),
            min_step=config.min_step,
            eps=eps,
        )
        self.mix = kernels.mamba2(spec)

    @property
    def spec(self) -> StateSpec:
        config = self.config
        return StateSpec(config.num_heads, config.head_dim, config.state_size, config.conv_dim, config.conv_width)

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; the sequences' states are afterwards as their last tokens leave them."""
        state = batch.kv[self.cache_index]
        assert isinstance(state, StateLayer)
        y = self.mix(self.in_proj(x, batch.adapters), self.weights, state, batch)
        return self.out_proj(y, batch.adapters)

    def ops(self) -> MambaOps:
        """The same for a backend that runs a decoder as one call."""
        return MambaOps(self.in_proj.only_kernel, self.mix, self.weights, self.out_proj.only_kernel, self.cache_index)
