"""A mixture of experts: a router picks some for each token; their results are weighed and summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nvfp4_runtime.batch import AdapterRows
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import MoEConfig
from nvfp4_runtime.errors import UnsupportedFormatError
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.kernels.whole_ops import MixtureBodyOps, MixtureOps
from nvfp4_runtime.layers.linear import Linear, linear_kernel, load_weight
from nvfp4_runtime.layers.mlp import MLP, PlainMLP
from nvfp4_runtime.nvfp4.weight import Weight, can_fuse, fuse


class MoE:
    """One layer's mixture, `prefix` being e.g. "model.layers.3.mlp", and `router` what its files call the router.

    A token's result depends on that token alone: experts compute row by row, and results are summed in the order in
    which the router ranked them, not in the order in which experts ran.
    """

    def __init__(
        self, ckpt: Checkpoint, kernels: Kernels, hidden: int, config: MoEConfig, prefix: str, router: str = "gate"
    ) -> None:
        self.config = config
        self.router = Router(ckpt, kernels, hidden, config, f"{prefix}.{router}")
        self.dtype: torch.dtype = getattr(torch, kernels.dtype)
        self.into_latent: Linear | None = None
        if latent := config.latent_size:
            self.into_latent = Linear.single(ckpt, kernels, f"{prefix}.fc1_latent_proj", latent, hidden)
            self.out_of_latent = Linear.single(ckpt, kernels, f"{prefix}.fc2_latent_proj", hidden, latent)
        self.experts = Experts(ckpt, kernels, latent or hidden, config, f"{prefix}.experts")
        self.shared: SharedExpert | None = None
        if config.shared_size:
            self.shared = SharedExpert(ckpt, kernels, hidden, config, prefix)
        scores, experts = self.router, self.experts
        self.run_as_one = kernels.mixture(
            MixtureOps(scores.project, scores.correction, config, experts.first, experts.activation, experts.down)
        )

    def __call__(self, x: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        """x [T, hidden] -> [T, hidden] of the stream's type. Adapters: on all but the router and routed experts."""
        inner_x = x if self.into_latent is None else self.into_latent(x, adapters).to(self.dtype)
        shared, gate = (None, None) if self.shared is None else self.shared(x, adapters)
        if self.into_latent is None:
            return self._routed(x, inner_x, shared, gate)
        y = self.out_of_latent(self._routed(x, inner_x, None, None).to(self.dtype), adapters)
        return y if shared is None else y + _gated(shared, gate)

    def ops(self) -> MixtureBodyOps | str:
        """The same for a backend that runs a decoder as one call."""
        if self.into_latent is not None:
            return "its experts lie between two more projections"
        if self.shared is None:
            return MixtureBodyOps(self.run_as_one, None, None)
        return MixtureBodyOps(self.run_as_one, self.shared.mlp.ops(), self.shared.gate)

    def _routed(self, x: Tensor, inner_x: Tensor, shared: Tensor | None, gate: Tensor | None) -> Tensor:
        """See `MixtureKernel`."""
        if self.run_as_one is not None:
            return self.run_as_one(x, inner_x, shared, gate)
        y = self.experts(inner_x, *self.router(x))
        return y if shared is None else y + _gated(shared, gate)


def _gated(shared: Tensor, gate: Tensor | None) -> Tensor:
    return shared if gate is None else (shared * gate.sigmoid()).to(shared.dtype)


class Router:
    """Scores every expert for every token. Its weight is read in FP32 precision whatever it is stored in."""

    def __init__(self, ckpt: Checkpoint, kernels: Kernels, hidden: int, config: MoEConfig, prefix: str) -> None:
        weight = load_weight(ckpt, prefix, config.num_experts, hidden, bias=config.biases)
        self.project = linear_kernel(kernels, "router", weight, [prefix], out_dtype="float32")
        self.config = config
        self.correction: Tensor | None = None
        if config.correction_bias:
            name = f"{prefix}.e_score_correction_bias"
            if not ckpt.has(name):  # MiniMax: beside the router, not in it
                name = f"{prefix.rpartition('.')[0]}.e_score_correction_bias"
            bias = ckpt.tensor(name, (config.num_experts,))
            self.correction = kernels.place(bias.to(torch.float32))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> (weights fp32 [T, top_k], experts int64 [T, top_k]), best first."""
        return route(self.project(x), self.config, self.correction)


def route(logits: Tensor, config: MoEConfig, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Router logits fp32 [T, E] to (weights fp32 [T, top_k], experts int64 [T, top_k]), best first.

    correction  fp32 [E], added to the scores for choosing only
    Source: Mixtral; DeepSeek-V3 for groups, sigmoid scores and the correction.
    """
    scores = logits.softmax(-1) if config.scoring == "softmax" else logits.sigmoid()
    ranked = scores if correction is None else scores + correction
    if config.num_groups > 1:
        groups = ranked.view(-1, config.num_groups, config.num_experts // config.num_groups)  # [T, G, E / G]
        best = groups.topk(2, dim=-1).values.sum(-1).topk(config.top_groups, dim=-1).indices
        kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        ranked = groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    chosen = ranked.topk(config.top_k, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if config.renormalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)  # sigmoids may all be 0
    return weights * config.scale, chosen


class Experts:
    """All experts' feed-forwards, gated or plain: two grouped multiplications over the tokens sorted by expert."""

    def __init__(self, ckpt: Checkpoint, kernels: Kernels, hidden: int, config: MoEConfig, prefix: str) -> None:
        count, inner = config.num_experts, config.intermediate_size
        projections = ("gate_proj", "up_proj") if config.gated else ("up_proj",)
        firsts = [ckpt.experts(prefix, name, count, inner, hidden) for name in projections]
        downs = ckpt.experts(prefix, "down_proj", count, hidden, inner)
        names = [f"{prefix}.{i}" for i in range(count)]
        for weights in (*firsts, downs):
            _check_biases(weights, names, config.biases)
        if config.gated and all(can_fuse(pair) for pair in zip(*firsts, strict=True)):
            firsts = [[fuse(pair) for pair in zip(*firsts, strict=True)]]
        group = "experts.gate_up_proj" if config.gated else "experts.up_proj"
        self.first = [kernels.grouped_linear(group, weights, names) for weights in firsts]
        self.down = kernels.grouped_linear("experts.down_proj", downs, names)
        self.activation = kernels.silu_mul(inner, config.gate) if config.gated else kernels.relu_squared(inner)
        self.dtype: torch.dtype = getattr(torch, kernels.dtype)
        self.bounds = kernels.place(torch.arange(count + 1))

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x [T, hidden], weights fp32 [T, k], chosen int64 [T, k] -> [T, hidden] of the stream's type."""
        return self.out_of(self.into(x, chosen), weights)

    def into(self, x: Tensor, chosen: Tensor) -> Inside:
        """The first half, up to what enters the second multiplication."""
        order, offsets = by_expert(chosen, self.bounds)
        rows = x[order // chosen.shape[1]]  # [T * k, hidden], sorted by expert
        parts = [kernel(rows, offsets) for kernel in self.first]
        inner = self.activation(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).to(self.dtype)
        return Inside(inner, order, offsets)

    def out_of(self, inside: Inside, weights: Tensor) -> Tensor:
        """The second half: each token's results, weighed and summed as the router ranked them."""
        y, order = self.down(inside.rows, inside.offsets), inside.order
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        ranked = y[places].view(*weights.shape, y.shape[1])
        total = ranked[:, 0] * weights[:, :1]
        for rank in range(1, weights.shape[1]):
            total = total + ranked[:, rank] * weights[:, rank : rank + 1]
        return total.to(y.dtype)


class Inside(NamedTuple):
    """What enters experts' second multiplication.

    rows            [T * k, intermediate size], sorted by expert
    order, offsets  see `by_expert`
    """

    rows: Tensor
    order: Tensor
    offsets: Tensor


def _check_biases(weights: Sequence[Weight], names: Sequence[str], expected: bool) -> None:
    for weight, name in zip(weights, names, strict=True):
        if (weight.bias is not None) != expected:
            raise UnsupportedFormatError(
                f"{name} has {'no bias although' if expected else 'a bias and'} this architecture's experts have "
                f"{'one each' if expected else 'none'}: the export does not fit config.json"
            )


def by_expert(chosen: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """(order, offsets) of a grouped multiplication over `chosen` int64 [T, k], an expert for each token and rank.

    bounds   int64 [E + 1], 0 to E
    order    int64 [T * k]: the flat places in `chosen`, sorted by expert, tokens of one in their order
    offsets  int32 [E + 1]: see GroupedLinearKernel
    """
    experts, order = chosen.flatten().sort(stable=True)
    return order, torch.searchsorted(experts, bounds, out_int32=True)


class SharedExpert:
    """The feed-forward that every token passes, behind a gate of its own where the model has one."""

    def __init__(self, ckpt: Checkpoint, kernels: Kernels, hidden: int, config: MoEConfig, prefix: str) -> None:
        name = f"{prefix}.shared_expert" if config.shared_gate else f"{prefix}.shared_experts"
        self.mlp: MLP | PlainMLP
        if config.gated:
            self.mlp = MLP(ckpt, kernels, hidden, config.shared_size, name)
        else:
            self.mlp = PlainMLP(ckpt, kernels, hidden, config.shared_size, name)
        self.gate = None
        if config.shared_gate:
            weight = load_weight(ckpt, f"{prefix}.shared_expert_gate", 1, hidden, bias=False)
            self.gate = linear_kernel(
                kernels, "shared_expert_gate", weight, [f"{prefix}.shared_expert_gate"], out_dtype="float32"
            )

    def __call__(self, x: Tensor, adapters: AdapterRows | None = None) -> tuple[Tensor, Tensor | None]:
        """(its result, before the gate; the gate's logits fp32 [T, 1])."""
        return self.mlp(x, adapters), None if self.gate is None else self.gate(x)
