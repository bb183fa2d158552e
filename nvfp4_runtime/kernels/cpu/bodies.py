"""What the blocks of a native decoder do between their norms: each a native object made from a layer's own kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.batch import CacheLayer, KVLayer, LatentLayer, StateLayer
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.cpu.checks import TYPE_CODES, check_tensor
from nvfp4_runtime.kernels.cpu.linear import NativeLinear
from nvfp4_runtime.kernels.cpu.ops import NativePagedAttention, NativeReluSquared, NativeRope, NativeSiluMul
from nvfp4_runtime.kernels.cpu.states import NativeMamba2
from nvfp4_runtime.kernels.cpu.whole import NativeLatent, NativeMixture
from nvfp4_runtime.kernels.ops import LinearKernel
from nvfp4_runtime.kernels.whole_ops import (
    AttentionOps,
    BodyOps,
    FeedForwardOps,
    LatentBodyOps,
    MambaOps,
    MixtureBodyOps,
)

_LINEAR = (NativeLinear,)


def refuses_body(body: BodyOps | str) -> str | None:
    """None when every op is native, or the first that is not."""
    if isinstance(body, str):
        return body
    wanted: list[tuple[str, object, tuple[type, ...]]] = []
    match body:
        case AttentionOps():
            wanted = [
                ("qkv", body.qkv, _LINEAR),
                ("rope", body.rope, (NativeRope,)),
                ("attention", body.attention, (NativePagedAttention,)),
                ("o", body.o, _LINEAR),
            ]
        case FeedForwardOps():
            activations = (NativeSiluMul, NativeReluSquared)
            wanted = [
                ("up", body.up, _LINEAR),
                ("activation", body.activation, activations),
                ("down", body.down, _LINEAR),
            ]
        case MixtureBodyOps():
            if body.mixture is None:
                return "its mixture runs op by op"
            wanted = [("mixture", body.mixture, (NativeMixture,))]
            if body.gate is not None:
                wanted.append(("the shared expert's gate", body.gate, _LINEAR))
            if body.shared is not None and (reason := refuses_body(body.shared)) is not None:
                return f"the shared expert: {reason}"
        case LatentBodyOps():
            if body.latent is None:
                return "its latent attention runs op by op"
            wanted = [("first", body.first, _LINEAR), ("latent", body.latent, (NativeLatent,)), ("o", body.o, _LINEAR)]
        case MambaOps():
            wanted = [
                ("in_proj", body.in_proj, _LINEAR),
                ("mix", body.mix, (NativeMamba2,)),
                ("out_proj", body.out_proj, _LINEAR),
            ]
    for name, op, kinds in wanted:
        if not isinstance(op, kinds):
            found = "in formats that cannot share a kernel" if op is None else f"a {type(op).__name__}"
            return f"{name} is {found}"
    return None


class NativeBody:
    """One block's body. `native` goes to the native decoder; `set_cache` where it keeps something in batch.kv.

    cache_index  its place there, or None
    needs_slots  reads batch.state_slots
    """

    native: Any
    cache_index: int | None = None
    needs_slots = False

    def __init__(self, hidden: int, dtype: torch.dtype, stream: torch.dtype) -> None:
        self.hidden, self.dtype, self.stream = hidden, dtype, stream
        self._codes = (TYPE_CODES[stream], TYPE_CODES[dtype])

    def set_cache(self, cache: CacheLayer) -> None:
        raise KernelError("a block that keeps nothing was given a cache")

    def _linear(self, name: str, linear: LinearKernel | None, n: int, k: int, out: torch.dtype | None = None) -> Any:
        """The native side of a linear whose shape must be [n, k]."""
        assert isinstance(linear, NativeLinear)
        wanted = (n, k, self.dtype, out or self.stream)
        if (linear.n, linear.k, linear.dtype, linear.out_dtype) != wanted:
            raise KernelError(
                f"{name}: expected [{n}, {k}] from {self.dtype} to {wanted[3]}, found [{linear.n}, {linear.k}] "
                f"from {linear.dtype} to {linear.out_dtype}"
            )
        return linear.native


class AttentionBody(NativeBody):
    def __init__(self, native: Any, context: Any, ops: AttentionOps, *types: Any) -> None:
        super().__init__(*types)
        self.cache_index = ops.cache_index
        assert isinstance(ops.rope, NativeRope)
        assert isinstance(ops.attention, NativePagedAttention)
        self._rope = ops.rope
        ops.rope.check_layer(ops.cos, ops.sin, ops.q_norm, ops.k_norm)
        sinks = ops.attention.check_sinks(ops.sinks)
        spec = ops.rope.spec
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        cos, sin, *norms = ops.rope.tables
        self.native = native.AttentionBody(
            context,
            *self._codes,
            self._linear("qkv", ops.qkv, q + 2 * kv, self.hidden),
            self._linear("o", ops.o, self.hidden, q),
            cos,
            sin,
            ops.rope.num_positions,
            *norms,
            ops.qk_norm_eps,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.rotary_dim,
            ops.scale,
            ops.attention.spec.window or 0,
            sinks,
        )

    def set_cache(self, cache: CacheLayer) -> None:
        assert isinstance(cache, KVLayer)
        checked = self._rope.cache
        arguments = checked.arguments(cache)
        self.native.set_cache(*arguments, checked.num_blocks, checked.block_size, *checked.blocks)


class FeedForwardBody(NativeBody):
    def __init__(self, native: Any, context: Any, ops: FeedForwardOps, *types: Any) -> None:
        super().__init__(*types)
        assert isinstance(ops.down, NativeLinear)
        activation, inner = ops.activation, ops.down.k
        assert isinstance(activation, NativeSiluMul | NativeReluSquared)
        if (activation.width, activation.dtype, activation.out_dtype) != (inner, self.stream, self.dtype):
            raise KernelError(
                f"activation: expected {inner} wide from {self.stream} to {self.dtype}, found {activation.width}"
            )
        gated = isinstance(activation, NativeSiluMul)
        self.native = native.FeedForward(
            context,
            *self._codes,
            self._linear("gate_up" if gated else "up", ops.up, (1 + gated) * inner, self.hidden),
            self._linear("down", ops.down, self.hidden, inner),
            gated,
            activation.gate_codes if isinstance(activation, NativeSiluMul) else (0, 0.0, 0.0),
        )


class MixtureBody(NativeBody):
    def __init__(self, native: Any, context: Any, ops: MixtureBodyOps, *types: Any) -> None:
        super().__init__(*types)
        assert isinstance(ops.mixture, NativeMixture)
        ops.mixture.check(self.hidden, self.dtype, self.stream)
        self._shared = None if ops.shared is None else FeedForwardBody(native, context, ops.shared, *types)
        gate = None if ops.gate is None else self._linear("gate", ops.gate, 1, self.hidden, torch.float32)
        self.native = native.MixtureBody(
            context, ops.mixture.native, None if self._shared is None else self._shared.native, gate
        )


class LatentBody(NativeBody):
    def __init__(self, native: Any, context: Any, ops: LatentBodyOps, *types: Any) -> None:
        super().__init__(*types)
        self.cache_index = ops.cache_index
        latent = ops.latent
        assert isinstance(latent, NativeLatent)
        self._latent = latent
        self.native = native.LatentBody(
            context,
            latent.native,
            self._linear("first", ops.first, latent.in_width, self.hidden),
            self._linear("o", ops.o, self.hidden, latent.out_width),
        )

    def set_cache(self, cache: CacheLayer) -> None:
        assert isinstance(cache, LatentLayer)
        self._latent.check_cache(cache)
        self.native.set_cache(cache.latent.data_ptr(), cache.latent.size(0), cache.latent.size(1))


class MambaBody(NativeBody):
    needs_slots = True

    def __init__(self, native: Any, context: Any, ops: MambaOps, *types: Any) -> None:
        super().__init__(*types)
        self.cache_index = ops.cache_index
        mix = ops.mix
        assert isinstance(mix, NativeMamba2)
        self._mix, spec = mix, mix.spec
        self._weights = mix.check_weights(ops.weights)  # the native side keeps addresses only
        self.native = native.MambaBody(
            context,
            *self._codes,
            self._linear("in_proj", ops.in_proj, sum(spec.widths), self.hidden),
            self._linear("out_proj", ops.out_proj, self.hidden, spec.inner),
            *self._weights,
            spec.num_heads,
            spec.head_dim,
            spec.state_size,
            spec.num_groups,
            spec.conv_width,
        )

    def set_cache(self, cache: CacheLayer) -> None:
        assert isinstance(cache, StateLayer)
        self._mix.check_state(cache)
        self.native.set_cache(cache.conv.data_ptr(), cache.ssm.data_ptr(), cache.ssm.size(0))


def make_body(
    native: Any, context: Any, body: BodyOps | str, hidden: int, dtype: torch.dtype, stream: torch.dtype
) -> NativeBody:
    types = (hidden, dtype, stream)
    match body:
        case AttentionOps():
            return AttentionBody(native, context, body, *types)
        case FeedForwardOps():
            return FeedForwardBody(native, context, body, *types)
        case MixtureBodyOps():
            return MixtureBody(native, context, body, *types)
        case LatentBodyOps():
            return LatentBody(native, context, body, *types)
        case MambaOps():
            return MambaBody(native, context, body, *types)
    raise AssertionError(f"a body that was refused: {body}")


def check_slots(slots: Tensor | None, sequences: int) -> int:
    """The address of batch.state_slots."""
    if slots is None:
        raise KernelError("a layer that keeps states needs batch.state_slots, found None")
    check_tensor("state_slots", slots, torch.int64, (sequences,))
    return slots.data_ptr()
