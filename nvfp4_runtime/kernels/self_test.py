"""Every kernel that a loaded model chose against the reference, on its own shapes and, for linears, its own weights.

A few rows each: enough to see a wrong address, scale, mask or tile, which is what a miscompiled or mismatched kernel
gets wrong. The bound is coarse, 3 % of the reference's root mean square beside BF16's rounding. The tests look closer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer, StateLayer
from nvfp4_runtime.config import KVDtype
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.ops import (
    ActivationSpec,
    Backend,
    DeltaSpec,
    DeltaWeights,
    GroupedLinearSpec,
    LinearSpec,
    Mamba2Spec,
    Mamba2Weights,
    MLASpec,
    NormSpec,
    OpSpec,
    PagedAttentionSpec,
    ReluSquaredSpec,
    RopeSpec,
)
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight

FLAG = "--no-self-test"
ROWS = 3  # of activations
OUTPUTS = 32  # of a weight's rows, at either end
_RTOL, _OF_RMS = 2.0**-7, 0.03
_BLOCK_SIZE = 16


def self_test(kernels: Kernels) -> int:
    """Compare; returns how many distinct ops were. Raises KernelError naming the op and the backend that differs.

    `kernels` was made with `keep_samples`, which are let go here.
    """
    samples, kernels.samples = kernels.samples or {}, None
    tests: list[tuple[OpSpec, str, Callable[[], tuple[Tensor, Tensor]]]] = []
    test = _Tests(kernels.device)
    for spec, (weights, kernel, name) in samples.items():
        tests.append((spec, name, functools.partial(test.weights, spec, weights, kernel)))
    for op, backend in kernels.chosen.items():
        make = test.of(op)
        if make is not None:
            tests.append((op, backend.name, lambda make=make, backend=backend: (make(backend), make(test.reference))))  # type: ignore[misc]
    compared = [(spec, name, run) for spec, name, run in tests if name != test.reference.name]
    with torch.inference_mode():
        for compared_spec, name, run in compared:
            found, expected = (result.float() for result in run())
            room = _RTOL * expected.abs() + _OF_RMS * expected.square().mean().sqrt() + 1e-30
            worst = float(((found - expected).abs() / room).max())  # NaN: not within
            if not worst <= 1.0:
                raise KernelError(
                    f"self-test: {name} computes {compared_spec} wrongly, {worst:.3g} times the allowed difference "
                    f"from the reference; use --backend reference, or {FLAG} to start all the same"
                )
    return len(compared)


class _Tests:
    """Inputs for each kind of op, the same for every backend."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reference = available_backends("reference", device="cuda" if device.type == "cuda" else "cpu")[0]

    def _random(self, dtype: str, *shape: int) -> Tensor:
        # numpy's: torch's generators are among what the engine's process leaves out of its import
        values = torch.from_numpy(np.random.default_rng(shape[-1]).standard_normal(shape, dtype=np.float32))
        return values.to(getattr(torch, dtype)).to(self._device)

    def weights(
        self, spec: LinearSpec | GroupedLinearSpec, weights: Sequence[Weight], kernel: Any
    ) -> tuple[Tensor, Tensor]:
        """What the kernel gives for some rows of its weight, and what the reference does."""
        if isinstance(spec, GroupedLinearSpec):
            return self.grouped(spec, weights, kernel)
        x = self._random(spec.dtype, ROWS, spec.k)
        return self._expert(spec, weights[0], kernel(x), x)

    def grouped(self, spec: GroupedLinearSpec, weights: Sequence[Weight], kernel: Any) -> tuple[Tensor, Tensor]:
        """Rows of the first expert and of the last, none of the others."""
        x = self._random(spec.dtype, 2 * ROWS, spec.k)
        offsets = torch.tensor([0] + [ROWS] * (len(weights) - 1) + [2 * ROWS], dtype=torch.int32, device=self._device)
        found = kernel(x, offsets)
        halves = [
            self._expert(spec.each, weight, found[rows], x[rows])
            for weight, rows in ((weights[0], slice(ROWS)), (weights[-1], slice(ROWS, None)))
        ]
        return torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])

    def _expert(self, spec: LinearSpec, weight: Weight, found: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, part = _some_rows(weight)
        expected = self.reference.linear(part, dataclasses.replace(spec, n=part.n))(x.contiguous())
        return found[:, rows.to(self._device)], expected

    def of(self, spec: OpSpec) -> Callable[[Backend], Tensor] | None:
        """What runs `spec` on a backend; None for kinds that are not compared here."""
        match spec:
            case NormSpec():
                return lambda backend: self._norm(backend, spec)
            case ActivationSpec():
                return lambda backend: backend.silu_mul(spec)(self._random(spec.dtype, ROWS, 2 * spec.width))
            case RopeSpec():
                return lambda backend: self._rope(backend, spec)
            case PagedAttentionSpec():
                return lambda backend: self._attention(backend, spec)
            case MLASpec():
                return lambda backend: self._mla(backend, spec)
            case ReluSquaredSpec():
                return lambda backend: backend.relu_squared(spec)(self._random(spec.dtype, ROWS, spec.width))
            case Mamba2Spec():
                return lambda backend: self._mamba2(backend, spec)
            case DeltaSpec():
                return lambda backend: self._delta(backend, spec)
        return None

    def _norm(self, backend: Backend, spec: NormSpec) -> Tensor:
        x, weight = self._random(spec.dtype, ROWS, spec.hidden), self._random(spec.out_dtype, spec.hidden)
        normed, total = backend.rms_norm(spec)(x, x.flip(0).clone(), weight, 1e-5)
        return torch.cat([normed.float(), total.float()], dim=1)

    def _rope(self, backend: Backend, spec: RopeSpec) -> Tensor:
        heads = spec.num_heads + 2 * spec.num_kv_heads
        batch, kv = self._batch(), self._cache(spec.kv_dtype, spec.num_kv_heads, spec.head_dim)
        tokens = batch.positions.shape[0]
        qkv = self._random(spec.dtype, tokens, heads * spec.head_dim)
        rates = 0.1 ** torch.arange(spec.rotary_dim // 2)
        angles = (torch.arange(64).unsqueeze(1) * rates).to(self._device)
        norm = self._random(spec.dtype, spec.head_dim) if spec.qk_norm else None
        rope = backend.rope_and_cache(spec)
        rotated = rope(qkv, batch.positions, angles.cos(), angles.sin(), norm, norm, 1e-5, kv, batch.slot_mapping)
        # what was stored is seen through the reference's attention
        seen = PagedAttentionSpec(
            spec.num_heads, spec.num_kv_heads, spec.head_dim, None, spec.kv_dtype, spec.dtype, spec.dtype
        )
        read = self.reference.paged_attention(seen)(rotated, kv, batch, spec.head_dim**-0.5)
        return torch.cat([rotated.flatten(1), read], dim=1)

    def _attention(self, backend: Backend, spec: PagedAttentionSpec) -> Tensor:
        batch, kv = self._batch(), self._cache(spec.kv_dtype, spec.num_kv_heads, spec.head_dim)
        q = self._random(spec.dtype, batch.positions.shape[0], spec.num_heads, spec.head_dim)
        sinks = self._random("float32", spec.num_heads) if spec.sinks else None
        return backend.paged_attention(spec)(q, kv, batch, spec.head_dim**-0.5, sinks)

    def _mla(self, backend: Backend, spec: MLASpec) -> Tensor:
        batch = self._batch()
        rank, rope = spec.kv_lora_rank, spec.rope_dim
        cache = self._random(spec.dtype, 5, _BLOCK_SIZE, rank + rope)
        q_nope, q_rope = (self._random(spec.dtype, 2, spec.num_heads, width) for width in (rank, rope))
        scale = (rank + rope) ** -0.5
        return backend.mla_decode(spec)(q_nope, q_rope, cache, batch.block_tables, batch.seq_lens, scale)

    def _mamba2(self, backend: Backend, spec: Mamba2Spec) -> Tensor:
        weights = Mamba2Weights(
            self._random("float32", spec.conv_dim, spec.conv_width),
            self._random("float32", spec.conv_dim),
            -self._random("float32", spec.num_heads).abs() - 0.1,
            self._random("float32", spec.num_heads),
            self._random("float32", spec.num_heads),
            self._random("float32", spec.inner),
            min_step=0.001,
            eps=1e-5,
        )
        projected = self._random(spec.dtype, ROWS + 1, sum(spec.widths))
        state = self._states(spec.conv_width, spec.conv_dim, spec.num_heads, spec.head_dim, spec.state_size)
        y = backend.mamba2(spec)(projected, weights, state, self._batch())
        return torch.cat([y.float().flatten(), state.ssm.flatten()])

    def _delta(self, backend: Backend, spec: DeltaSpec) -> Tensor:
        heads = spec.num_value_heads
        a = -self._random("float32", heads).abs() - 0.1
        weights = DeltaWeights(
            self._random("float32", spec.conv_dim, spec.conv_width), a, self._random("float32", heads)
        )
        qkv = self._random(spec.dtype, ROWS + 1, spec.conv_dim)
        b, dt = (self._random(spec.dtype, ROWS + 1, heads) for _ in range(2))
        state = self._states(spec.conv_width, spec.conv_dim, heads, spec.value_dim, spec.key_dim)
        y = backend.gated_delta(spec)(qkv, b, dt, weights, state, self._batch())
        return torch.cat([y.flatten(), state.ssm.flatten()])

    def _states(self, conv_width: int, conv_dim: int, *ssm: int) -> StateLayer:
        return StateLayer(self._random("float32", 3, conv_width - 1, conv_dim), self._random("float32", 3, *ssm))

    def _batch(self) -> ForwardBatch:
        """A sequence of 19 tokens that decodes, one of 21 whose last three are new; blocks 1 to 4, slots 2 and 1."""
        positions = [18, 18, 19, 20]
        slots = [2 * _BLOCK_SIZE + 2, *(4 * _BLOCK_SIZE + p - _BLOCK_SIZE for p in positions[1:])]

        def tensor(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)

        return ForwardBatch(
            input_ids=tensor([0] * 4, torch.int64),
            positions=tensor(positions, torch.int64),
            slot_mapping=tensor(slots, torch.int64),
            block_tables=tensor([[1, 2], [3, 4]]),
            seq_lens=tensor([19, 21]),
            cu_seqlens_q=tensor([0, 1, 4]),
            logits_rows=tensor([0], torch.int64),
            kv=(),
            max_query_len=3,
            max_seq_len=21,
            state_slots=tensor([2, 1], torch.int64),
        )

    def _cache(self, kv_dtype: KVDtype, kv_heads: int, head_dim: int) -> KVLayer:
        shape = (5, kv_heads, _BLOCK_SIZE)
        if kv_dtype == "nvfp4":
            codes = np.random.default_rng(head_dim).integers(0, 256, (2, *shape, head_dim // 2), dtype=np.uint8)
            k, v = torch.from_numpy(codes)
            scales = torch.full((*shape, head_dim // 16), 0.25).to(torch.float8_e4m3fn)
            k, v, k_blocks, v_blocks = (t.to(self._device) for t in (k, v, scales, scales.clone()))
            return KVLayer(k, v, 1.0, 1.0, k_blocks, v_blocks)
        dtype = "float8_e4m3fn" if kv_dtype == "fp8" else kv_dtype
        return KVLayer(self._random(dtype, *shape, head_dim), self._random(dtype, *shape, head_dim).flip(0).clone())


def _some_rows(weight: Weight) -> tuple[Tensor, Weight]:
    """Indices of some rows of a weight, and these rows as a weight of their own."""
    if isinstance(weight, NVFP4Weight):
        return _some_nvfp4_rows(weight)
    count = min(OUTPUTS, weight.n)
    if isinstance(weight, FP8Weight):
        count = min(weight.n, -(-count // weight.block[0]) * weight.block[0])
        scale = weight.scale[: -(-count // weight.block[0])]
        return torch.arange(count), dataclasses.replace(
            weight,
            codes=weight.codes[:count],
            scale=scale,
            block=(min(weight.block[0], count), weight.block[1]),
            bias=_part(weight.bias, slice(count)),
        )
    if isinstance(weight, MXFP4Weight):
        part = MXFP4Weight(weight.packed[:count], weight.block_scale[:count], _part(weight.bias, slice(count)))
        return torch.arange(count), part
    rows = _both_ends(weight.n)
    return rows, DenseWeight(weight.weight[rows.to(weight.weight.device)], _part(weight.bias, rows))


def _some_nvfp4_rows(weight: NVFP4Weight) -> tuple[Tensor, NVFP4Weight]:
    """The first rows of the first part and the last of the last: fused parts are not joined for this."""
    (first, first_scale), (last, last_scale) = weight.parts[0], weight.parts[-1]
    head = min(OUTPUTS, first.shape[0])
    tail = min(OUTPUTS, last.shape[0], weight.n - head)
    ends = last.shape[0] - tail
    rows = torch.cat([torch.arange(head), torch.arange(weight.n - tail, weight.n)])
    scales = [first_scale[:head].view(torch.uint8), last_scale[ends:].view(torch.uint8)]
    part = NVFP4Weight(
        packed=torch.cat([first[:head], last[ends:]]),
        block_scale=torch.cat(scales).view(torch.float8_e4m3fn),
        weight_scale_2=weight.row_scale_2()[rows.to(weight.weight_scale_2.device)],
        group_rows=(1,) * len(rows),
        input_scale=weight.input_scale,
        bias=_part(weight.bias, rows),
    )
    return rows, part


def _both_ends(n: int) -> Tensor:
    rows = torch.arange(n)
    return rows if n <= 2 * OUTPUTS else torch.cat([rows[:OUTPUTS], rows[-OUTPUTS:]])


def _part(bias: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    return None if bias is None else bias[rows]
