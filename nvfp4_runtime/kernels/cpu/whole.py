"""A mixture's routed part, and latent attention between its projections, each as one native call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, LatentLayer
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.cpu.checks import TYPE_CODES, StepMemo, check_matrix, check_tensor
from nvfp4_runtime.kernels.cpu.grouped import NativeGroupedLinear
from nvfp4_runtime.kernels.cpu.linear import NativeLinear
from nvfp4_runtime.kernels.cpu.ops import NativeReluSquared, NativeRMSNorm, NativeSiluMul, check_norm_weight
from nvfp4_runtime.kernels.cpu.states import NativeMLA
from nvfp4_runtime.kernels.ops import NormOp
from nvfp4_runtime.kernels.whole_ops import LatentOps, MixtureOps


def refuses_mixture(ops: MixtureOps) -> str | None:
    """None when every op is native, or the first that is not."""
    activation = NativeSiluMul if ops.config.gated else NativeReluSquared
    if len(ops.first) != 1:
        return "gate and up are in formats that cannot share a kernel"
    for name, op, kind in (
        ("router", ops.router, NativeLinear),
        ("first", ops.first[0], NativeGroupedLinear),
        ("activation", ops.activation, activation),
        ("down", ops.down, NativeGroupedLinear),
    ):
        if not isinstance(op, kind):
            return f"{name} is a {type(op).__name__}"
    return None


class NativeMixture:
    """See `MixtureKernel`. A token's experts are those its scores rank highest, the lower index first among equals."""

    def __init__(self, native: Any, context: Any, ops: MixtureOps) -> None:
        assert refuses_mixture(ops) is None
        router, first, down, config = ops.router, ops.first[0], ops.down, ops.config
        assert isinstance(router, NativeLinear)
        assert isinstance(first, NativeGroupedLinear)
        assert isinstance(down, NativeGroupedLinear)
        self._ops = ops  # the native side keeps addresses only
        self.dtype, self.stream = first.dtype, down.out_dtype
        self._widths = (router.k, first.k, down.n)
        self._correction = None if ops.correction is None else ops.correction.to(torch.float32).contiguous()
        if self._correction is not None:
            check_tensor("correction", self._correction, torch.float32, (config.num_experts,))
        activation = ops.activation
        self.native = native.Mixture(
            context,
            router.native,
            0 if self._correction is None else self._correction.data_ptr(),
            config.num_experts,
            config.top_k,
            config.num_groups,
            config.top_groups,
            config.scoring == "softmax",
            config.renormalise,
            config.scale,
            first.native,
            down.native,
            config.gated,
            activation.gate_codes if isinstance(activation, NativeSiluMul) else (0, 0.0, 0.0),
            TYPE_CODES[self.stream],
            TYPE_CODES[self.dtype],
        )
        self._run = self.native.run

    def __call__(self, x: Tensor, inner_x: Tensor, shared: Tensor | None, gate: Tensor | None) -> Tensor:
        hidden, inner, out_width = self._widths
        rows = x.size(0)
        check_matrix("x", x, self.dtype, hidden)
        if inner_x is not x:
            check_tensor("inner_x", inner_x, self.dtype, (rows, inner))
        if shared is not None:
            check_tensor("shared", shared, self.stream, (rows, out_width))
        if gate is not None:
            check_tensor("gate", gate, torch.float32, (rows, 1))
        out = torch.empty((rows, out_width), dtype=self.stream)
        self._run(
            x.data_ptr(),
            inner_x.data_ptr(),
            rows,
            0 if shared is None else shared.data_ptr(),
            0 if gate is None else gate.data_ptr(),
            out.data_ptr(),
        )
        return out

    def check(self, hidden: int, dtype: torch.dtype, stream: torch.dtype) -> None:
        """Raise KernelError unless it reads and gives rows like these."""
        if (self._widths, self.dtype, self.stream) != ((hidden,) * 3, dtype, stream):
            raise KernelError(
                f"mixture: expected {hidden} wide from {dtype} to {stream}, found {self._widths} from {self.dtype} to "
                f"{self.stream}"
            )

    @property
    def chosen(self) -> list[int]:
        """The experts of the last call, token by token, best first."""
        return list(self.native.chosen)


def refuses_latent(ops: LatentOps) -> str | None:
    """None when every op is native, or the first that is not."""
    for name, op, kind in (
        ("q_norm", None if ops.q_norm is None else ops.q_norm.kernel, NativeRMSNorm),
        ("q_b", ops.q_b, NativeLinear),
        ("kv_norm", ops.kv_norm.kernel, NativeRMSNorm),
        ("keys", ops.keys, NativeGroupedLinear),
        ("values", ops.values, NativeGroupedLinear),
        ("attention", ops.attend, NativeMLA),
    ):
        if op is not None and not isinstance(op, kind):
            return f"{name} is a {type(op).__name__}"
    if ops.q_norm is not None and ops.q_b is None:
        return "q_b is in formats that cannot share a kernel"
    return None


class NativeLatent:
    """See `LatentKernel`."""

    def __init__(self, native: Any, context: Any, memo: StepMemo, ops: LatentOps) -> None:
        assert refuses_latent(ops) is None
        keys, values, config = ops.keys, ops.values, ops.config
        assert isinstance(keys, NativeGroupedLinear)
        assert isinstance(values, NativeGroupedLinear)
        assert isinstance(ops.kv_norm.kernel, NativeRMSNorm)
        self._ops, self._memo = ops, memo  # the native side keeps addresses only
        self.dtype, self.stream = keys.dtype, ops.kv_norm.kernel.dtype
        queries = ops.num_heads * (config.nope_dim + config.rope_dim)
        self._query_width = queries if ops.q_norm is None else config.q_lora_rank or 0
        self._cache_width = config.kv_lora_rank + config.rope_dim
        self.out_width = ops.num_heads * config.v_dim
        self.in_width = self._query_width + self._cache_width
        half = config.rope_dim // 2
        check_tensor("cos", ops.cos, torch.float32, (-1, half))
        check_tensor("sin", ops.sin, torch.float32, (ops.cos.size(0), half))
        assert ops.q_b is None or isinstance(ops.q_b, NativeLinear)
        self.native = native.LatentLayer(
            context,
            (ops.num_heads, config.nope_dim, config.rope_dim, config.kv_lora_rank, config.v_dim, self._query_width),
            config.interleaved,
            config.scale,
            (0, 0, 0.0) if ops.q_norm is None else _norm(ops.q_norm, self._query_width),
            None if ops.q_b is None else ops.q_b.native,
            _norm(ops.kv_norm, config.kv_lora_rank),
            keys.native,
            values.native,
            ops.cos.data_ptr(),
            ops.sin.data_ptr(),
            ops.cos.size(0),
            TYPE_CODES[self.stream],
            TYPE_CODES[self.dtype],
        )
        self._run = self.native.run

    def __call__(self, projected: Tensor, cache: LatentLayer, batch: ForwardBatch) -> Tensor:
        check_matrix("projected", projected, self.stream, self.in_width)
        rows = projected.size(0)
        self._memo.check_slots(batch.positions, batch.slot_mapping, rows)
        self.check_cache(cache)
        tables, lengths = batch.each_token
        check_tensor("block_tables", tables, torch.int32, (rows, -1))
        check_tensor("seq_lens", lengths, torch.int32, (rows,))
        out = torch.empty((rows, self.out_width), dtype=self.dtype)
        self._run(
            projected.data_ptr(),
            rows,
            batch.positions.data_ptr(),
            batch.slot_mapping.data_ptr(),
            tables.data_ptr(),
            lengths.data_ptr(),
            tables.size(1),
            cache.latent.data_ptr(),
            cache.latent.size(1),
            cache.latent.size(0),
            out.data_ptr(),
        )
        return out

    def check_cache(self, cache: LatentLayer) -> None:
        check_tensor("cache", cache.latent, self.dtype, (-1, -1, self._cache_width))


def _norm(norm: NormOp, width: int) -> tuple[int, int, float]:
    check_norm_weight("weight", norm.weight, width)
    if norm.weight.size(0) != width:
        raise KernelError(f"a norm over {width} values has a weight of {norm.weight.size(0)}")
    return norm.weight.data_ptr(), TYPE_CODES[norm.weight.dtype], norm.eps
