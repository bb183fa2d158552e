"""Norm, activation, rotary embedding and attention of the native backend. Each checks its tensors, then hands over."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.config import SILU
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.cpu.checks import TYPE_CODES, StepMemo, check_matrix, check_tensor
from nvfp4_runtime.kernels.ops import ActivationSpec, NormSpec, PagedAttentionSpec, ReluSquaredSpec, RopeSpec

KV_TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "nvfp4": torch.uint8,
}
NVFP4_CODE = 16  # csrc/types.h: Type::nvfp4
GATE_CODES = {"silu": 0, "gelu_tanh": 1, "clamped": 2}  # csrc/types.h: Gate


class NativeRMSNorm:
    """See `RMSNormKernel`. The sum is written over the residual."""

    def __init__(self, context: Any, spec: NormSpec) -> None:
        self._run = context.rms_norm
        self.hidden = spec.hidden
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._types = (TYPE_CODES[self.dtype], TYPE_CODES[self.out_dtype])
        self._weight: Tensor | None = None

    def __call__(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        check_matrix("x", x, self.dtype, self.hidden)
        rows, residual_at = x.size(0), 0
        if residual is not None:
            check_matrix("residual", residual, self.dtype, self.hidden)
            if residual.size(0) != rows:
                raise KernelError(f"x has {rows} rows and its residual {residual.size(0)}; expected the same number")
            residual_at = residual.data_ptr()
        if weight is not self._weight:
            check_norm_weight("weight", weight, self.hidden)
            self._weight, self._weight_type = weight, TYPE_CODES[weight.dtype]
        out = torch.empty((rows, self.hidden), dtype=self.out_dtype)
        self._run(
            x.data_ptr(),
            residual_at,
            weight.data_ptr(),
            self._weight_type,
            out.data_ptr(),
            *self._types,
            rows,
            self.hidden,
            eps,
        )
        return out, x if residual is None else residual


class NativeReluSquared:
    """See `ReluSquaredSpec`."""

    def __init__(self, context: Any, spec: ReluSquaredSpec) -> None:
        self._run = context.relu_squared
        self.width = spec.width
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._types = (TYPE_CODES[self.dtype], TYPE_CODES[self.out_dtype])

    def __call__(self, x: Tensor) -> Tensor:
        check_matrix("x", x, self.dtype, self.width)
        out = torch.empty((x.size(0), self.width), dtype=self.out_dtype)
        self._run(x.data_ptr(), out.data_ptr(), *self._types, x.size(0), self.width)
        return out


class NativeSiluMul:
    """See `ActivationSpec`."""

    def __init__(self, context: Any, spec: ActivationSpec) -> None:
        self._run = context.silu_mul if spec.gate == SILU else context.gated
        self.gate_codes = (GATE_CODES[spec.gate.form], spec.gate.alpha, spec.gate.limit)
        self._gate = () if spec.gate == SILU else self.gate_codes
        self.width, self.gate = spec.width, spec.gate
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._types = (TYPE_CODES[self.dtype], TYPE_CODES[self.out_dtype])

    def __call__(self, gate_up: Tensor) -> Tensor:
        check_matrix("gate_up", gate_up, self.dtype, 2 * self.width)
        rows = gate_up.size(0)
        out = torch.empty((rows, self.width), dtype=self.out_dtype)
        self._run(gate_up.data_ptr(), out.data_ptr(), *self._types, rows, self.width, *self._gate)
        return out


class CheckedCache:
    """One layer's cache as native arguments, checked when it is first seen. Does not keep the cache alive."""

    def __init__(self, kv_dtype: str, num_kv_heads: int, head_dim: int) -> None:
        self.dtype = KV_TORCH_DTYPES[kv_dtype]
        self._nvfp4 = kv_dtype == "nvfp4"
        self._type = NVFP4_CODE if self._nvfp4 else TYPE_CODES[self.dtype]
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self._seen: weakref.ref[KVLayer] | None = None
        self._arguments: tuple[int, int, int, float, float] = (0, 0, 0, 0.0, 0.0)
        self.blocks = (0, 0)  # addresses of the block scales of K and V, 0 unless nvfp4

    def arguments(self, kv: KVLayer) -> tuple[int, int, int, float, float]:
        """Addresses of K and V, their type, k_scale, v_scale; and `blocks` is set."""
        if self._seen is None or self._seen() is not kv:
            width = self.head_dim // 2 if self._nvfp4 else self.head_dim
            check_tensor("kv.k", kv.k, self.dtype, (-1, self.num_kv_heads, -1, width))
            check_tensor("kv.v", kv.v, self.dtype, tuple(kv.k.shape))
            if kv.k.size(0) * kv.k.size(2) == 0:
                raise KernelError(f"kv.k: found {list(kv.k.shape)}, expected at least one block of at least one token")
            self.blocks = self._check_blocks(kv)
            self._seen = weakref.ref(kv)
            self._arguments = (kv.k.data_ptr(), kv.v.data_ptr(), self._type, kv.k_scale, kv.v_scale)
            self.num_blocks, self.block_size = kv.k.size(0), kv.k.size(2)
        return self._arguments

    def _check_blocks(self, kv: KVLayer) -> tuple[int, int]:
        if not self._nvfp4:
            if kv.k_blocks is not None or kv.v_blocks is not None:
                raise KernelError(f"kv: a cache of {self.dtype} has no block scales; leave k_blocks and v_blocks None")
            return 0, 0
        if kv.k_blocks is None or kv.v_blocks is None:
            raise KernelError("kv: an nvfp4 cache needs block scales; expected k_blocks and v_blocks, found None")
        shape = (*kv.k.shape[:3], self.head_dim // 16)
        check_tensor("kv.k_blocks", kv.k_blocks, torch.float8_e4m3fn, shape)
        check_tensor("kv.v_blocks", kv.v_blocks, torch.float8_e4m3fn, shape)
        return kv.k_blocks.data_ptr(), kv.v_blocks.data_ptr()


class NativeRope:
    """See `RopeKernel`. Raises IndexError for a slot outside the cache or a position outside the tables."""

    def __init__(self, context: Any, memo: StepMemo, spec: RopeSpec) -> None:
        self._run, self._memo = context.rope, memo
        self.spec = spec
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self._type = TYPE_CODES[self.dtype]
        self._width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        self.cache = CheckedCache(spec.kv_dtype, spec.num_kv_heads, spec.head_dim)
        self._shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.rotary_dim)
        self._layer: tuple[Tensor | None, ...] = ()

    def __call__(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        kv: KVLayer,
        slot_mapping: Tensor,
    ) -> Tensor:
        spec, rows = self.spec, qkv.size(0)
        check_matrix("qkv", qkv, self.dtype, self._width)
        self._memo.check_slots(positions, slot_mapping, rows)
        layer = self._layer
        if not (layer and cos is layer[0] and sin is layer[1] and q_norm is layer[2] and k_norm is layer[3]):
            self.check_layer(cos, sin, q_norm, k_norm)
        cache = self.cache.arguments(kv)
        q = torch.empty((rows, spec.num_heads, spec.head_dim), dtype=self.dtype)
        self._run(
            qkv.data_ptr(),
            self._type,
            rows,
            positions.data_ptr(),
            *self.tables,
            eps,
            q.data_ptr(),
            *cache,
            slot_mapping.data_ptr(),
            *self._shape,
            self.cache.block_size,
            self.cache.num_blocks * self.cache.block_size,
            self.num_positions,
            *self.cache.blocks,
        )
        return q

    def check_layer(self, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> None:
        spec, half = self.spec, self.spec.rotary_dim // 2
        check_tensor("cos", cos, torch.float32, (-1, half))
        check_tensor("sin", sin, torch.float32, (cos.shape[0], half))
        if (q_norm is not None) != spec.qk_norm or (k_norm is not None) != spec.qk_norm:
            raise KernelError(f"this layer was built with qk_norm={spec.qk_norm}; q_norm and k_norm must agree with it")
        norms = (0, 0, 0)
        if q_norm is not None and k_norm is not None:
            check_norm_weight("q_norm", q_norm, spec.head_dim)
            check_tensor("k_norm", k_norm, q_norm.dtype, (spec.head_dim,))
            norms = (q_norm.data_ptr(), k_norm.data_ptr(), TYPE_CODES[q_norm.dtype])
        self._layer = (cos, sin, q_norm, k_norm)
        self.tables = (cos.data_ptr(), sin.data_ptr(), *norms)
        self.num_positions = cos.size(0)


class NativePagedAttention:
    """See `AttentionKernel`. A query's result depends on its own keys only, not on chunking, batch or threads.

    Raises IndexError when the block tables or lengths point outside the cache.
    """

    def __init__(self, context: Any, memo: StepMemo, spec: PagedAttentionSpec) -> None:
        self._run, self._memo = context.attention, memo
        self.spec = spec
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._type, self._out_type = TYPE_CODES[self.dtype], TYPE_CODES[self.out_dtype]
        self._cache = CheckedCache(spec.kv_dtype, spec.num_kv_heads, spec.head_dim)
        self._shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        self._width = spec.num_heads * spec.head_dim
        self._sinks: Tensor | None = None
        self._last: tuple[int, ...] = ()

    def __call__(
        self, q: Tensor, kv: KVLayer, batch: ForwardBatch, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        spec = self.spec
        if sinks is not self._sinks or (sinks is None) is spec.sinks:
            self.check_sinks(sinks)
        check_tensor("q", q, self.dtype, (-1, spec.num_heads, spec.head_dim))
        self._memo.check_batch(batch)
        cache = self._cache.arguments(kv)
        rows = q.size(0)
        out = torch.empty((rows, self._width), dtype=self.out_dtype)
        self._run(
            q.data_ptr(),
            self._type,
            rows,
            out.data_ptr(),
            self._out_type,
            *cache,
            scale,
            batch.block_tables.data_ptr(),
            batch.block_tables.size(1),
            batch.cu_seqlens_q.data_ptr(),
            batch.seq_lens.data_ptr(),
            batch.seq_lens.size(0),
            *self._shape,
            self._cache.block_size,
            spec.window or 0,
            self._cache.num_blocks,
            *self._cache.blocks,
            *self._last,
        )
        return out

    def check_sinks(self, sinks: Tensor | None) -> int:
        """Their address, 0 for none."""
        if (sinks is not None) != self.spec.sinks:
            raise KernelError(f"this layer was built with sinks={self.spec.sinks}; the call must agree with it")
        if sinks is None:
            return 0
        check_tensor("sinks", sinks, torch.float32, (self.spec.num_heads,))
        self._sinks, self._last = sinks, (sinks.data_ptr(),)
        return sinks.data_ptr()


def check_norm_weight(name: str, weight: Tensor, width: int) -> None:
    """A norm's weight may be stored wider or narrower than the activations; all three float types are read."""
    dtype = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else torch.float32
    check_tensor(name, weight, dtype, (width,))
