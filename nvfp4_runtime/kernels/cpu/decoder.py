"""A decoder up to its head as one native call: the same kernels, handed over once instead of some ten times a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.batch import CacheLayer, ForwardBatch
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.cpu.bodies import LatentBody, check_slots, make_body, refuses_body
from nvfp4_runtime.kernels.cpu.checks import TYPE_CODES, StepMemo, check_tensor
from nvfp4_runtime.kernels.cpu.ops import NativeRMSNorm, check_norm_weight
from nvfp4_runtime.kernels.ops import NormOp
from nvfp4_runtime.kernels.whole_ops import DecoderOps


def refuses_decoder(ops: DecoderOps) -> str | None:
    """None when every op is native, or the first that is not."""
    if not isinstance(ops.norm.kernel, NativeRMSNorm):
        return f"the last norm is a {type(ops.norm.kernel).__name__}"
    types = (ops.norm.kernel.dtype, ops.norm.kernel.out_dtype)
    for i, block in enumerate(ops.blocks):
        norm = block.norm.kernel
        if not isinstance(norm, NativeRMSNorm):
            return f"block {i}: the norm is a {type(norm).__name__}"
        if (norm.dtype, norm.out_dtype) != types:
            return f"block {i}: its norm goes from {norm.dtype} to {norm.out_dtype}, the last from {types}"
        if (reason := refuses_body(block.body)) is not None:
            return f"block {i}: {reason}"
    return None


class NativeDecoder:
    """See `DecoderKernel`. Raises IndexError for slots, positions and block tables outside the cache and the tables."""

    def __init__(self, native: Any, context: Any, memo: StepMemo, ops: DecoderOps) -> None:
        assert isinstance(ops.norm.kernel, NativeRMSNorm)
        self.hidden = ops.norm.kernel.hidden
        self.stream, self.dtype = ops.norm.kernel.dtype, ops.norm.kernel.out_dtype
        self._memo = memo
        self._ops = ops  # the native side keeps addresses only
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
        self._bodies = []
        for block in ops.blocks:
            body = make_body(native, context, block.body, self.hidden, self.dtype, self.stream)
            self._decoder.add(self._norm(block.norm), body.native)
            self._bodies.append(body)
        self._keepers = [(body.cache_index, body) for body in self._bodies if body.cache_index is not None]
        self._needs_slots = any(body.needs_slots for body in self._bodies)
        self.decodes_only = any(isinstance(body, LatentBody) for body in self._bodies)
        self._kv: tuple[CacheLayer, ...] = ()

    def _norm(self, norm: NormOp) -> tuple[int, int, float]:
        check_norm_weight("weight", norm.weight, self.hidden)
        return norm.weight.data_ptr(), TYPE_CODES[norm.weight.dtype], norm.eps

    def __call__(self, batch: ForwardBatch) -> Tensor:
        rows, wanted = batch.input_ids.size(0), batch.logits_rows.size(0)
        check_tensor("input_ids", batch.input_ids, torch.int64, (rows,))
        check_tensor("logits_rows", batch.logits_rows, torch.int64, (wanted,))
        self._memo.check_slots(batch.positions, batch.slot_mapping, rows)
        self._memo.check_batch(batch)
        sequences = batch.seq_lens.size(0)
        slots = check_slots(batch.state_slots, sequences) if self._needs_slots else 0
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
            sequences,
            slots,
        )
        return out

    def _set_cache(self, kv: tuple[CacheLayer, ...]) -> None:
        if len(kv) != len(self._keepers):
            raise KernelError(f"{len(self._keepers)} layers need as many KV caches, found {len(kv)}")
        self._kv = ()  # should one be refused, the next call starts again: some addresses are already the new ones
        for index, body in self._keepers:
            body.set_cache(kv[index])
        self._kv = kv
