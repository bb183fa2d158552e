"""Norm, activation, rotary embedding and attention of the native backend. Each checks its tensors, then hands over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.cpu.checks import TYPE_CODES, check_tensor
from nvfp4_runtime.kernels.ops import ActivationSpec, NormSpec, PagedAttentionSpec, RopeSpec

KV_TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8": torch.float8_e4m3fn}


class NativeRMSNorm:
    """See `RMSNormKernel`. The sum is written over the residual."""

    def __init__(self, context: Any, spec: NormSpec) -> None:
        self._run = context.rms_norm
        self.hidden = spec.hidden
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self._type = TYPE_CODES[self.dtype]

    def __call__(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        check_tensor("x", x, self.dtype, (-1, self.hidden))
        if residual is not None:
            check_tensor("residual", residual, self.dtype, (x.shape[0], self.hidden))
        check_norm_weight("weight", weight, self.hidden)
        out = torch.empty_like(x)
        self._run(
            x.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            TYPE_CODES[weight.dtype],
            out.data_ptr(),
            self._type,
            x.shape[0],
            self.hidden,
            eps,
        )
        return out, x if residual is None else residual


class NativeSiluMul:
    """silu(gate) * up; see `ActivationSpec`."""

    def __init__(self, context: Any, spec: ActivationSpec) -> None:
        self._run = context.silu_mul
        self.width = spec.width
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self._type = TYPE_CODES[self.dtype]

    def __call__(self, gate_up: Tensor) -> Tensor:
        check_tensor("gate_up", gate_up, self.dtype, (-1, 2 * self.width))
        out = torch.empty((gate_up.shape[0], self.width), dtype=self.dtype)
        self._run(gate_up.data_ptr(), out.data_ptr(), self._type, gate_up.shape[0], self.width)
        return out


class NativeRope:
    """See `RopeKernel`. Raises IndexError for a slot outside the cache or a position outside the tables."""

    def __init__(self, context: Any, spec: RopeSpec) -> None:
        self._run = context.rope
        self.spec = spec
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.kv_dtype = KV_TORCH_DTYPES[spec.kv_dtype]

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
        spec, rows = self.spec, qkv.shape[0]
        dim, half = spec.head_dim, spec.rotary_dim // 2
        check_tensor("qkv", qkv, self.dtype, (-1, (spec.num_heads + 2 * spec.num_kv_heads) * dim))
        check_tensor("positions", positions, torch.int64, (rows,))
        check_tensor("slot_mapping", slot_mapping, torch.int64, (rows,))
        check_tensor("cos", cos, torch.float32, (-1, half))
        check_tensor("sin", sin, torch.float32, (cos.shape[0], half))
        if (q_norm is not None and k_norm is not None) != spec.qk_norm:
            raise KernelError(f"this layer was built with qk_norm={spec.qk_norm}; q_norm and k_norm must agree with it")
        if q_norm is not None and k_norm is not None:
            check_norm_weight("q_norm", q_norm, dim)
            check_tensor("k_norm", k_norm, q_norm.dtype, (dim,))
        check_cache(kv, self.kv_dtype, spec.num_kv_heads, dim)
        q = torch.empty((rows, spec.num_heads, dim), dtype=self.dtype)
        self._run(
            qkv.data_ptr(),
            TYPE_CODES[self.dtype],
            rows,
            positions.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            0 if q_norm is None else q_norm.data_ptr(),
            0 if k_norm is None else k_norm.data_ptr(),
            0 if q_norm is None else TYPE_CODES[q_norm.dtype],
            eps,
            q.data_ptr(),
            kv.k.data_ptr(),
            kv.v.data_ptr(),
            TYPE_CODES[self.kv_dtype],
            kv.k_scale,
            kv.v_scale,
            slot_mapping.data_ptr(),
            spec.num_heads,
            spec.num_kv_heads,
            dim,
            spec.rotary_dim,
            kv.block_size,
            kv.k.shape[0] * kv.block_size,
            cos.shape[0],
        )
        return q


class NativePagedAttention:
    """See `AttentionKernel`. A query's result depends on its own keys only, not on chunking, batch or threads.

    Raises IndexError when the block tables or lengths point outside the cache.
    """

    def __init__(self, context: Any, spec: PagedAttentionSpec) -> None:
        self._run = context.attention
        self.spec = spec
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.kv_dtype = KV_TORCH_DTYPES[spec.kv_dtype]

    def __call__(self, q: Tensor, kv: KVLayer, batch: ForwardBatch, scale: float) -> Tensor:
        spec = self.spec
        check_tensor("q", q, self.dtype, (-1, spec.num_heads, spec.head_dim))
        check_cache(kv, self.kv_dtype, spec.num_kv_heads, spec.head_dim)
        sequences = batch.seq_lens.shape[0]
        check_tensor("block_tables", batch.block_tables, torch.int32, (sequences, -1))
        check_tensor("seq_lens", batch.seq_lens, torch.int32, (sequences,))
        check_tensor("cu_seqlens_q", batch.cu_seqlens_q, torch.int32, (sequences + 1,))
        out = torch.empty((q.shape[0], spec.num_heads * spec.head_dim), dtype=self.dtype)
        self._run(
            q.data_ptr(),
            TYPE_CODES[self.dtype],
            q.shape[0],
            out.data_ptr(),
            kv.k.data_ptr(),
            kv.v.data_ptr(),
            TYPE_CODES[self.kv_dtype],
            kv.k_scale,
            kv.v_scale,
            scale,
            batch.block_tables.data_ptr(),
            batch.block_tables.shape[1],
            batch.cu_seqlens_q.data_ptr(),
            batch.seq_lens.data_ptr(),
            sequences,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            kv.block_size,
            spec.window or 0,
            kv.k.shape[0],
        )
        return out


def check_norm_weight(name: str, weight: Tensor, width: int) -> None:
    """A norm's weight may be stored wider or narrower than the activations; all three float types are read."""
    dtype = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else torch.float32
    check_tensor(name, weight, dtype, (width,))


def check_cache(kv: KVLayer, dtype: torch.dtype, num_kv_heads: int, head_dim: int) -> None:
    """K and V of one layer: same shape, as the layer was built for."""
    check_tensor("kv.k", kv.k, dtype, (-1, num_kv_heads, -1, head_dim))
    check_tensor("kv.v", kv.v, dtype, tuple(kv.k.shape))
