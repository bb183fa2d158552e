"""Latent attention, Mamba-2 and the gated delta rule, natively: ops over latent caches and over recurrent states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, StateLayer
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.cpu.checks import TYPE_CODES, check_matrix, check_tensor
from nvfp4_runtime.kernels.ops import DeltaSpec, DeltaWeights, Mamba2Spec, Mamba2Weights, MLASpec


class NativeMLA:
    """See `MLAKernel`. Queries, cache and sums are multiplied and summed in FP32 whatever they are stored in."""

    def __init__(self, context: Any, spec: MLASpec) -> None:
        self._run = context.latent
        self.spec = spec
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)

    def __call__(
        self, q_nope: Tensor, q_rope: Tensor, cache: Tensor, block_tables: Tensor, seq_lens: Tensor, scale: float
    ) -> Tensor:
        spec, count = self.spec, q_nope.size(0)
        check_tensor("q_nope", q_nope, self.dtype, (count, spec.num_heads, spec.kv_lora_rank))
        check_tensor("q_rope", q_rope, self.dtype, (count, spec.num_heads, spec.rope_dim))
        check_tensor("cache", cache, self.dtype, (-1, -1, spec.kv_lora_rank + spec.rope_dim))
        check_tensor("block_tables", block_tables, torch.int32, (count, -1))
        check_tensor("seq_lens", seq_lens, torch.int32, (count,))
        out = torch.empty(q_nope.shape, dtype=self.out_dtype)
        self._run(
            q_nope.data_ptr(),
            q_rope.data_ptr(),
            cache.data_ptr(),
            TYPE_CODES[self.dtype],
            out.data_ptr(),
            TYPE_CODES[self.out_dtype],
            block_tables.data_ptr(),
            block_tables.size(1),
            seq_lens.data_ptr(),
            count,
            spec.num_heads,
            spec.kv_lora_rank,
            spec.rope_dim,
            cache.size(1),
            cache.size(0),
            scale,
        )
        return out


class NativeMamba2:
    """See `Mamba2Kernel`."""

    def __init__(self, context: Any, spec: Mamba2Spec) -> None:
        self._run = context.mamba2
        self.spec = spec
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._row = sum(spec.widths)
        self._checked: Mamba2Weights | None = None

    def __call__(self, projected: Tensor, weights: Mamba2Weights, state: StateLayer, batch: ForwardBatch) -> Tensor:
        spec = self.spec
        check_matrix("projected", projected, self.dtype, self._row)
        count = projected.size(0)
        if weights is not self._checked:
            self._addresses, self._checked = self.check_weights(weights), weights
        slots = _check_batch(batch, count)
        self.check_state(state)
        out = torch.empty((count, spec.inner), dtype=self.out_dtype)
        if count:
            self._run(
                projected.data_ptr(),
                TYPE_CODES[self.dtype],
                *self._addresses,
                state.conv.data_ptr(),
                state.ssm.data_ptr(),
                slots.data_ptr(),
                batch.positions.data_ptr(),
                batch.cu_seqlens_q.data_ptr(),
                slots.size(0),
                state.conv.size(0),
                spec.num_heads,
                spec.head_dim,
                spec.state_size,
                spec.num_groups,
                spec.conv_width,
                out.data_ptr(),
                TYPE_CODES[self.out_dtype],
            )
        return out

    def check_state(self, state: StateLayer) -> None:
        spec = self.spec
        shape = (spec.num_heads, spec.head_dim, spec.state_size)
        _check_state(state, (spec.conv_width - 1, spec.conv_dim), shape)

    def check_weights(self, weights: Mamba2Weights) -> tuple[int | float, ...]:
        """What native calls take of them, in order: addresses that live as long as `weights`."""
        spec = self.spec
        check_tensor("conv_weight", weights.conv_weight, torch.float32, (spec.conv_dim, spec.conv_width))
        check_tensor("conv_bias", weights.conv_bias, torch.float32, (spec.conv_dim,))
        check_tensor("norm", weights.norm, torch.float32, (spec.inner,))
        for name, vector in (("a", weights.a), ("dt_bias", weights.dt_bias), ("d", weights.d)):
            check_tensor(name, vector, torch.float32, (spec.num_heads,))
        return (
            weights.dt_bias.data_ptr(),
            weights.a.data_ptr(),
            weights.min_step,
            weights.taps.data_ptr(),
            weights.conv_bias.data_ptr(),
            weights.d.data_ptr(),
            weights.norm.data_ptr(),
            weights.eps,
        )


class NativeDelta:
    """See `DeltaKernel`."""

    def __init__(self, context: Any, spec: DeltaSpec) -> None:
        self._run = context.gated_delta
        self.spec = spec
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self._weights: DeltaWeights | None = None

    def __call__(
        self, qkv: Tensor, b: Tensor, dt: Tensor, weights: DeltaWeights, state: StateLayer, batch: ForwardBatch
    ) -> Tensor:
        spec = self.spec
        check_matrix("qkv", qkv, self.dtype, spec.conv_dim)
        count = qkv.size(0)
        check_tensor("b", b, self.dtype, (count, spec.num_value_heads))
        check_tensor("dt", dt, self.dtype, (count, spec.num_value_heads))
        if weights is not self._weights:
            self._check_weights(weights)
        slots = _check_batch(batch, count)
        shape = (spec.num_value_heads, spec.value_dim, spec.key_dim)
        _check_state(state, (spec.conv_width - 1, spec.conv_dim), shape)
        out = torch.empty(count, spec.values, dtype=torch.float32)
        if count:
            self._run(
                qkv.data_ptr(),
                b.data_ptr(),
                dt.data_ptr(),
                TYPE_CODES[self.dtype],
                weights.dt_bias.data_ptr(),
                weights.a.data_ptr(),
                self._taps.data_ptr(),
                self._no_bias.data_ptr(),
                state.conv.data_ptr(),
                state.ssm.data_ptr(),
                slots.data_ptr(),
                batch.positions.data_ptr(),
                batch.cu_seqlens_q.data_ptr(),
                slots.size(0),
                state.conv.size(0),
                spec.num_value_heads,
                spec.value_dim,
                spec.key_dim,
                spec.num_key_heads,
                spec.conv_width,
                out.data_ptr(),
            )
        return out

    def _check_weights(self, weights: DeltaWeights) -> None:
        spec = self.spec
        check_tensor("conv_weight", weights.conv_weight, torch.float32, (spec.conv_dim, spec.conv_width))
        for name, vector in (("a", weights.a), ("dt_bias", weights.dt_bias)):
            check_tensor(name, vector, torch.float32, (spec.num_value_heads,))
        self._weights, self._taps = weights, weights.conv_weight.t().contiguous()
        self._no_bias = torch.zeros(spec.conv_dim)


def _check_state(state: StateLayer, conv: tuple[int, ...], ssm: tuple[int, ...]) -> None:
    """Both are [slots, ...]."""
    check_tensor("state.conv", state.conv, torch.float32, (-1, *conv))
    check_tensor("state.ssm", state.ssm, torch.float32, (state.conv.size(0), *ssm))


def _check_batch(batch: ForwardBatch, count: int) -> Tensor:
    """The batch's slots, when its `count` tokens are as kernels need them."""
    slots = batch.state_slots
    if slots is None:
        raise KernelError("a layer that keeps states needs batch.state_slots, found None")
    check_tensor("state_slots", slots, torch.int64, (-1,))
    check_tensor("positions", batch.positions, torch.int64, (count,))
    check_tensor("cu_seqlens_q", batch.cu_seqlens_q, torch.int32, (slots.size(0) + 1,))
    if int(batch.cu_seqlens_q[0]) != 0 or int(batch.cu_seqlens_q[-1]) != count:
        raise KernelError(f"cu_seqlens_q runs to {int(batch.cu_seqlens_q[-1])}; the input has {count} rows")
    return slots
