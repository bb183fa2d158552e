"""A decoder up to its head as one native call: the same kernels, handed over once instead of eleven times a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.batch import CacheLayer, ForwardBatch, KVLayer
from nvfp4_runtime.config import SILU
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.cpu.checks import TYPE_CODES, StepMemo, check_tensor
from nvfp4_runtime.kernels.cpu.linear import NativeLinear
from nvfp4_runtime.kernels.cpu.ops import (
    NativePagedAttention,
    NativeRMSNorm,
    NativeRope,
    NativeSiluMul,
    check_norm_weight,
)
from nvfp4_runtime.kernels.ops import DecoderLayerOps, DecoderOps, NormOp


def refuses_decoder(ops: DecoderOps) -> str | None:
    """None when every op is native, or the first that is not."""
    if not isinstance(ops.norm.kernel, NativeRMSNorm):
        return f"the last norm is a {type(ops.norm.kernel).__name__}"
    for i, layer in enumerate(ops.layers):
        for name, op, kinds in (
            ("input_norm", layer.input_norm.kernel, (NativeRMSNorm,)),
            ("qkv", layer.qkv, (NativeLinear,)),
            ("rope", layer.rope, (NativeRope,)),
            ("attention", layer.attention, (NativePagedAttention,)),
            ("o", layer.o, (NativeLinear,)),
            ("post_norm", layer.post_norm.kernel, (NativeRMSNorm,)),
            ("gate_up", layer.gate_up, (NativeLinear,)),
            ("silu_mul", layer.silu_mul, (NativeSiluMul,)),
            ("down", layer.down, (NativeLinear,)),
        ):
            if not isinstance(op, kinds):
                found = "in formats that cannot share a kernel" if op is None else f"a {type(op).__name__}"
                return f"layer {i}: {name} is {found}"
        assert isinstance(layer.silu_mul, NativeSiluMul)
        if layer.silu_mul.gate != SILU:
            return f"layer {i}: the feed-forward's gate is {layer.silu_mul.gate.form}"
    return None


class NativeDecoder:
    """See `DecoderKernel`. Raises IndexError for slots, positions and block tables outside the cache and the tables."""

    def __init__(self, native: Any, context: Any, memo: StepMemo, ops: DecoderOps) -> None:
        assert isinstance(ops.norm.kernel, NativeRMSNorm)
        self.hidden = ops.norm.kernel.hidden
        self.stream, self.dtype = ops.norm.kernel.dtype, ops.norm.kernel.out_dtype
        self._memo = memo
        self._ops = ops  # the native side keeps addresses only
        self._layers = tuple(ops.layers)
        embedding = ops.embedding
        dtype = embedding.dtype if embedding.dtype in (torch.bfloat16, torch.float16) else torch.float32
        check_tensor("embedding", embedding, dtype, (-1, self.hidden))
        self._decoder = native.Decoder(
            context,
            self.hidden,
            TYPE_CODES[self.stream],
            TYPE_CODES[self.dtype],
            embedding.data_ptr(),
            TYPE_CODES[dtype],
            embedding.size(0),
            self._norm(ops.norm),
        )
        for layer in self._layers:
            self._add(layer)
        self._kv: tuple[CacheLayer, ...] = ()

    def _add(self, layer: DecoderLayerOps) -> None:
        rope, attention = layer.rope, layer.attention
        assert isinstance(rope, NativeRope)
        assert isinstance(attention, NativePagedAttention)
        rope.check_layer(layer.cos, layer.sin, layer.q_norm, layer.k_norm)
        spec = rope.spec
        cos, sin, *norms = rope.tables
        self._decoder.add(
            self._norm(layer.input_norm),
            self._norm(layer.post_norm),
            *(linear.native for linear in self._linears(layer)),
            TYPE_CODES[self.stream],
            TYPE_CODES[self.dtype],
            cos,
            sin,
            rope.num_positions,
            *norms,
            layer.qk_norm_eps,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.rotary_dim,
            layer.scale,
            attention.spec.window or 0,
        )

    def _norm(self, norm: NormOp) -> tuple[int, int, float]:
        check_norm_weight("weight", norm.weight, self.hidden)
        return norm.weight.data_ptr(), TYPE_CODES[norm.weight.dtype], norm.eps

    def _linears(self, layer: DecoderLayerOps) -> list[NativeLinear]:
        """qkv, o, gate_up and down, whose shapes must follow one another."""
        assert isinstance(layer.rope, NativeRope)
        spec = layer.rope.spec
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        found: list[NativeLinear] = []
        assert isinstance(layer.down, NativeLinear)
        inner = layer.down.k
        for name, linear, n, k in (
            ("qkv", layer.qkv, q + 2 * kv, self.hidden),
            ("o", layer.o, self.hidden, q),
            ("gate_up", layer.gate_up, 2 * inner, self.hidden),
            ("down", layer.down, self.hidden, inner),
        ):
            assert isinstance(linear, NativeLinear)
            if (linear.n, linear.k, linear.dtype, linear.out_dtype) != (n, k, self.dtype, self.stream):
                raise KernelError(
                    f"{name}: expected [{n}, {k}] from {self.dtype} to {self.stream}, found [{linear.n}, {linear.k}] "
                    f"from {linear.dtype} to {linear.out_dtype}"
                )
            found.append(linear)
        return found

    def __call__(self, batch: ForwardBatch) -> Tensor:
        rows, wanted = batch.input_ids.size(0), batch.logits_rows.size(0)
        check_tensor("input_ids", batch.input_ids, torch.int64, (rows,))
        check_tensor("logits_rows", batch.logits_rows, torch.int64, (wanted,))
        self._memo.check_slots(batch.positions, batch.slot_mapping, rows)
        self._memo.check_batch(batch)
        if batch.kv is not self._kv:
            self._set_cache(batch.kv)
        out = torch.empty((wanted, self.hidden), dtype=self.dtype)
        self._decoder.run(
            batch.input_ids.data_ptr(),
            rows,
            batch.logits_rows.data_ptr(),
            wanted,
            out.data_ptr(),
            batch.positions.data_ptr(),
            batch.slot_mapping.data_ptr(),
            batch.block_tables.data_ptr(),
            batch.block_tables.size(1),
            batch.cu_seqlens_q.data_ptr(),
            batch.seq_lens.data_ptr(),
            batch.seq_lens.size(0),
        )
        return out

    def _set_cache(self, kv: tuple[CacheLayer, ...]) -> None:
        if len(kv) != len(self._layers):
            raise KernelError(f"{len(self._layers)} layers need as many KV caches, found {len(kv)}")
        self._kv = ()  # should one be refused, the next call starts again: some addresses are already the new ones
        for i, (layer, cache) in enumerate(zip(self._layers, kv, strict=True)):
            assert isinstance(layer.rope, NativeRope)
            assert isinstance(cache, KVLayer)
            checked = layer.rope.cache
            arguments = checked.arguments(cache)
            self._decoder.set_cache(i, *arguments, checked.num_blocks, checked.block_size, *checked.blocks)
        self._kv = kv
