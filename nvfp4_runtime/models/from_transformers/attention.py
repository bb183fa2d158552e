"""Attention of a transformers model over our paged cache, by the registry that transformers has for such functions.

All tokens of a step are one row for the model: [1, T]. Which sequence each belongs to is known here alone, from the
step that the model hands through its keyword arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.cache.specs import AttentionSpec
from nvfp4_runtime.config import KVDtype
from nvfp4_runtime.errors import UnsupportedFormatError
from nvfp4_runtime.kernels.ops import PagedAttentionSpec, RopeSpec
from nvfp4_runtime.kernels.registry import Kernels

NAME = "nvfp4_paged"
ARGUMENT = "nvfp4_step"
_OTHER_ARITHMETIC = {"softcap": "capped scores", "position_bias": "biased scores"}


class Step(Protocol):
    """What the attention of one forward pass is computed by."""

    def attend(self, layer_id: int, call: Call) -> Tensor:
        """[B, T, H, D_v]"""
        ...


@dataclass(frozen=True)
class Call:
    """One layer's queries [B, H, T, D], keys and values [B, H_kv, T, D or D_v] of the new tokens, rope applied.

    B is 1, or T is: all tokens of a step in one row, or sequences that go on by one token each.

    sinks  [H]: one more score in each head's softmax, without a value; None: there is none
    """

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    window: int | None
    sinks: Tensor | None = None


def register() -> None:
    """Make `NAME` an attention implementation of transformers. No mask is built for it."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it. Raises UnsupportedFormatError for what the paged kernels do not compute."""
    step: Step | None = options.pop(ARGUMENT, None)
    name = type(module).__name__
    if step is None:
        raise refused(f"{name} does not pass keyword arguments on to its attention")
    for option, what in _OTHER_ARITHMETIC.items():
        if options.get(option) is not None:
            raise refused(f"{name} has {what}")
    if attention_mask is not None or not getattr(module, "is_causal", True):
        raise refused(f"{name} has a mask of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer_id = getattr(module, "layer_idx", None)
    if not isinstance(layer_id, int):
        raise refused(f"{name} does not say which layer it is")
    return step.attend(layer_id, Call(module, query, key, value, scale, sliding_window, s_aux)), None


def refused(why: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(f"--model-impl transformers cannot run this model: {why}")


@dataclass
class Probe:
    """Notes what each layer asks for, and answers with zeros."""

    calls: dict[int, Call] = field(default_factory=dict)

    def attend(self, layer_id: int, call: Call) -> Tensor:
        if layer_id in self.calls:
            raise refused(f"layer {layer_id} has two attentions")
        self.calls[layer_id] = call
        rows, heads, tokens, _ = call.q.shape
        return call.q.new_zeros(rows, tokens, heads, call.v.shape[-1])


class PagedLayer:
    """One layer's cache write and attention. Where values are narrower than keys both are cached at the keys' width."""

    def __init__(self, kernels: Kernels, call: Call, kv_dtype: KVDtype, window: int | None) -> None:
        heads, kv_heads = call.q.shape[1], call.k.shape[1]
        self.width = max(call.k.shape[-1], call.v.shape[-1])
        if kv_dtype == "nvfp4":  # one block scale per 16 dimensions
            self.width = -(-self.width // 16) * 16
        self.window, self.kv_heads, self.v_dim = window, kv_heads, call.v.shape[-1]
        self.stream: torch.dtype = getattr(torch, kernels.stream)
        # rope is done: none of the dimensions turns
        self.no_turn = kernels.place(torch.empty(1, 0, dtype=torch.float32))
        self.write = kernels.rope_and_cache(RopeSpec(heads, kv_heads, self.width, 0, False, kv_dtype, kernels.stream))
        sinks = call.sinks is not None
        self.attend = kernels.paged_attention(
            PagedAttentionSpec(heads, kv_heads, self.width, window, kv_dtype, kernels.stream, kernels.dtype, sinks)
        )

    def spec(self, scales: tuple[float, float] | None) -> AttentionSpec:
        k_scale, v_scale = scales or (1.0, 1.0)
        return AttentionSpec(self.kv_heads, self.width, self.window, k_scale, v_scale, scales is not None)

    def __call__(self, call: Call, batch: ForwardBatch, index: int) -> Tensor:
        parts = [self._rows(part) for part in (call.q, call.k, call.v)]
        qkv, kv = torch.cat(parts, dim=-1), batch.kv_layer(index)
        nowhere = torch.zeros_like(batch.positions)
        q = self.write(qkv, nowhere, self.no_turn, self.no_turn, None, None, 0.0, kv, batch.slot_mapping)
        rows, heads, tokens, _ = call.q.shape
        sinks = None if call.sinks is None else call.sinks.to(torch.float32)
        out = self.attend(q, kv, batch, call.scale, sinks).view(rows, tokens, heads, self.width)
        return out[..., : self.v_dim].to(call.q.dtype)

    def _rows(self, x: Tensor) -> Tensor:
        """[B, H, T, D] -> [B * T, H * width] of the stream's type."""
        x = nn.functional.pad(x.transpose(1, 2).flatten(0, 1), (0, self.width - x.shape[-1]))
        return x.flatten(1).to(self.stream)


@dataclass(frozen=True)
class PagedStep:
    """One step's attention. `places`: a layer's number to the place of its keys and values in batch.kv."""

    batch: ForwardBatch
    layers: dict[int, PagedLayer]
    places: dict[int, int]

    def attend(self, layer_id: int, call: Call) -> Tensor:
        return self.layers[layer_id](call, self.batch, self.places[layer_id])
