"""The Mamba-2 mixer: projection to gate, convolved inputs and steps; selective scan; gated group norm; projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
from nvfp4_runtime.parallel import Team, scaled, share, shifted


class Mamba2:
    """One layer's mixer, `prefix` being e.g. "backbone.layers.3.mixer".

    cache_index  the place of its states in batch.kv

    The ranks of a team share the groups, each with its heads, its B and C, its states and its norm.
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
        whole, own = config, _Own(config, kernels.team)
        self.config = config = own.config
        self.cache_index = cache_index
        spec = Mamba2Spec(
            config.num_heads,
            config.head_dim,
            config.state_size,
            config.num_groups,
            config.conv_width,
            kernels.stream,
            kernels.dtype,
        )
        outputs = whole.inner + whole.conv_dim + whole.num_heads
        self.in_proj = Linear.single(ckpt, kernels, f"{prefix}.in_proj", outputs, hidden, rows=own.outputs)
        self.out_proj = Linear.single(ckpt, kernels, f"{prefix}.out_proj", hidden, whole.inner, columns=own.inner)

        def plain(name: str, runs: Sequence[range], *shape: int) -> Tensor:
            found = ckpt.tensor(f"{prefix}.{name}", shape).to(torch.float32)
            kept = [found[run.start : run.stop] for run in runs]
            return kernels.place(kept[0].contiguous() if len(kept) == 1 else torch.cat(kept))

        heads = whole.num_heads
        self.weights = Mamba2Weights(
            conv_weight=plain("conv1d.weight", own.conv, whole.conv_dim, 1, whole.conv_width).squeeze(1),
            conv_bias=plain("conv1d.bias", own.conv, whole.conv_dim),
            a=-plain("A_log", [own.heads], heads).exp(),
            dt_bias=plain("dt_bias", [own.heads], heads),
            d=plain("D", [own.heads], heads),
            norm=plain("norm.weight", [own.inner], whole.inner),
            min_step=whole.min_step,
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


class _Own:
    """What of a mixer is this rank's.

    config   as if it were a mixer of its own
    heads    of the whole mixer's
    inner    columns of its result
    conv     channels of the convolution: of x, of B, of C
    outputs  rows of in_proj: gate, x, B, C, steps
    """

    def __init__(self, config: Mamba2Config, team: Team) -> None:
        groups = share(config.num_groups, team, "groups of Mamba-2 heads")
        self.heads = scaled(groups, config.num_heads // config.num_groups)
        self.config = replace(config, num_heads=len(self.heads), num_groups=len(groups))
        self.inner = scaled(self.heads, config.head_dim)
        state, bc = scaled(groups, config.state_size), config.num_groups * config.state_size
        if team.size == 1:
            self.conv = [range(config.conv_dim)]
            self.outputs = [range(config.inner + config.conv_dim + config.num_heads)]
            return
        self.conv = [self.inner, shifted(state, config.inner), shifted(state, config.inner + bc)]
        steps = shifted(self.heads, config.inner + config.conv_dim)
        self.outputs = [self.inner, *(shifted(run, config.inner) for run in self.conv), steps]
