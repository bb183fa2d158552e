"""What takes the place of a transformers model's linear layers and experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.layers.linear import linear_kernel, load_weight
from nvfp4_runtime.layers.moe import by_expert
from nvfp4_runtime.nvfp4.weight import DenseWeight, Weight, can_fuse, fuse


class PackedLinear(nn.Module):
    """A linear layer on one of our kernels. Rows of any leading shape, result in the input's type."""

    def __init__(self, kernels: Kernels, weight: Weight, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.k, weight.n
        self.kernel = linear_kernel(kernels, name.rpartition(".")[2], weight, [name])
        self.dtype = dtype

    @classmethod
    def load(cls, ckpt: Checkpoint, kernels: Kernels, name: str, linear: nn.Linear, dtype: torch.dtype) -> PackedLinear:
        """In place of `linear`, which tells the shape."""
        weight = load_weight(ckpt, name, linear.out_features, linear.in_features, linear.bias is not None)
        return cls(kernels, weight, name, dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).to(self.dtype).contiguous()
        return self.kernel(rows).view(*x.shape[:-1], self.out_features).to(x.dtype)


class PackedExperts(nn.Module):
    """All experts of a layer on grouped kernels, behind the signature that transformers' experts have.

    activation  what lies between the two multiplications: [rows, width of the first] -> [rows, intermediate size]
    interleaved gate and up alternate in what `activation` takes
    """

    def __init__(
        self,
        kernels: Kernels,
        first: list[list[Weight]],
        down: list[Weight],
        name: str,
        activation: Callable[[Tensor], Tensor],
        interleaved: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        group = name.rpartition(".")[2]
        names = [f"{name}.{i}" for i in range(len(down))]
        parts = (
            first
            if len(first) == 1 or not all(map(can_fuse, zip(*first, strict=True)))
            else [[fuse(pair) for pair in zip(*first, strict=True)]]
        )
        self.first = [kernels.grouped_linear(f"{group}.gate_up_proj", part, names) for part in parts]
        self.down = kernels.grouped_linear(f"{group}.down_proj", down, names)
        self.activation, self.interleaved, self.dtype = activation, interleaved, dtype
        self.bounds = kernels.place(torch.arange(len(down) + 1))

    @classmethod
    def load(cls, ckpt: Checkpoint, kernels: Kernels, name: str, experts: Any, dtype: torch.dtype) -> PackedExperts:
        """In place of `experts`, whose parameters tell the shapes."""
        shape = experts.get_parameter("down_proj").shape
        count, inner, hidden = shape if experts.is_transposed else (shape[0], shape[2], shape[1])
        gated = bool(experts.has_gate)
        projections = ("gate_proj", "up_proj") if gated else ("up_proj",)
        first = [ckpt.experts(name, projection, count, inner, hidden) for projection in projections]
        down = ckpt.experts(name, "down_proj", count, hidden, inner)
        activation = experts._apply_gate if gated else experts.act_fn
        return cls(kernels, first, down, name, activation, gated and not experts.is_concatenated, dtype)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, hidden], the others [T, k] -> [T, hidden]."""
        num_tokens, top_k = top_k_index.shape
        order, offsets = by_expert(top_k_index, self.bounds)
        rows = hidden_states.to(self.dtype)[order // top_k]
        parts = [kernel(rows, offsets) for kernel in self.first]
        gate_up = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if self.interleaved:
            gate_up = torch.stack(gate_up.chunk(2, dim=-1), dim=-1).flatten(-2)
        y = self.down(self.activation(gate_up).to(self.dtype).contiguous(), offsets)
        weighed = torch.zeros_like(y)
        weighed[order] = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        return weighed.view(num_tokens, top_k, y.shape[1]).sum(dim=1).to(hidden_states.dtype)


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds a layer's experts as stacks, as transformers marks such classes."""
    down = dict(module.named_parameters(recurse=False)).get("down_proj")
    return down is not None and down.dim() == 3 and hasattr(module, "is_transposed")


def tied_head(kernels: Kernels, embedding: Tensor, dtype: torch.dtype) -> PackedLinear:
    """The head that is the embedding."""
    return PackedLinear(kernels, DenseWeight(embedding), "lm_head", dtype)
