"""Mamba-2's convolution, selective scan and gated norm: three launches, four where prompts are computed.

The scan goes token by token, states in registers: a prompt's bits do not depend on how it was cut, and a decoding step
is the same program over one token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, StateLayer
from nvfp4_runtime.kernels.compilation import Compilation
from nvfp4_runtime.kernels.ops import Mamba2Spec, Mamba2Weights
from nvfp4_runtime.kernels.triton.causal_conv import CausalConv, check_rows, check_states, silu, softplus
from nvfp4_runtime.kernels.triton.common import emulated, round_to

_STATE_VALUES = 2048  # of a program: 16 registers a thread


@triton.jit
def selective_scan_kernel(
    mixed,
    projected,
    out,
    ssm,
    slots,
    positions,
    bounds,
    a,
    dt_bias,
    d,
    min_step,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STATE: tl.constexpr,
    STATE_WIDTH: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CONV_DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    STEPS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Program (b, h, p): rows p * DIMS .. of head h's state, over the new tokens of sequence b.

    mixed        fp32 [T, CONV_DIM]: x, B and C after the convolution
    projected    [T, STRIDE]: the steps from column STEPS on
    out          fp32 [T, HEADS * HEAD_DIM]
    ssm          fp32 [slots, HEADS, HEAD_DIM, STATE]
    PER_GROUP    heads that share B and C           STATE_WIDTH  STATE padded to a power of two
    """
    seq = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    col = tl.arange(0, STATE_WIDTH)
    inside, used = dim < HEAD_DIM, col < STATE
    start = tl.load(bounds + seq).to(tl.int64)
    stop = tl.load(bounds + seq + 1).to(tl.int64)
    first = tl.load(positions + start, mask=start < stop, other=0)
    slot = tl.load(slots + seq)
    at = ((slot * HEADS + head) * HEAD_DIM + dim)[:, None] * STATE + col[None, :]
    # a limit instead of a condition: see keep_last
    begun = col < tl.where(first != 0, STATE, 0)
    state = tl.load(ssm + at, mask=inside[:, None] & begun[None, :], other=0.0)
    rate = tl.load(a + head)
    shift = tl.load(dt_bias + head)
    skip = tl.load(d + head)
    b_at = HEADS * HEAD_DIM + (head // PER_GROUP) * STATE
    c_at = b_at + (HEADS // PER_GROUP) * STATE
    for t in range(start, stop):
        row = mixed + t * CONV_DIM
        dt = tl.load(projected + t * STRIDE + STEPS + head).to(tl.float32)
        step = softplus(dt + shift)
        step = tl.where(step < min_step, min_step, step)  # a NaN passes
        x = tl.load(row + head * HEAD_DIM + dim, mask=inside, other=0.0)
        b = tl.load(row + b_at + col, mask=used, other=0.0)
        c = tl.load(row + c_at + col, mask=used, other=0.0)
        state = state * tl.exp(step * rate) + (step * x)[:, None] * b[None, :]
        y = tl.sum(state * c[None, :], axis=1) + skip * x
        tl.store(out + t * (HEADS * HEAD_DIM) + head * HEAD_DIM + dim, y, mask=inside)
    advanced = col < tl.where(start < stop, STATE, 0)
    tl.store(ssm + at, state, mask=inside[:, None] & advanced[None, :])


@triton.jit
def gated_norm_kernel(
    y,
    projected,
    weight,
    out,
    eps,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Program (t, g): RMSNorm of y * silu(gate) over group g's GROUP channels of token t, times `weight`."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < GROUP
    channel = tl.program_id(1) * GROUP + col
    gate = tl.load(projected + row * STRIDE + channel, mask=mask, other=0.0).to(tl.float32)
    gated = tl.load(y + row * (GROUPS * GROUP) + channel, mask=mask, other=0.0) * silu(gate)
    mean = tl.sum(gated * gated, axis=0) / GROUP
    normed = gated * tl.rsqrt(mean + eps) * tl.load(weight + channel, mask=mask, other=0.0)
    tl.store(out + row * (GROUPS * GROUP) + channel, round_to(normed, out.dtype.element_ty, EMULATED), mask=mask)


class TritonMamba2:
    """See `Mamba2Kernel`. Slots and bounds are not checked. A sequence's result depends on its tokens alone."""

    def __init__(self, spec: Mamba2Spec) -> None:
        self.spec = spec
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self.stride = sum(spec.widths)
        self.conv = CausalConv(spec.conv_dim, spec.conv_width, self.stride, spec.inner)

    def __call__(self, projected: Tensor, weights: Mamba2Weights, state: StateLayer, batch: ForwardBatch) -> Tensor:
        spec, count = self.spec, projected.shape[0]
        check_rows("projected", projected, self.dtype, count, self.stride)
        shape = (spec.num_heads, spec.head_dim, spec.state_size)
        slots = check_states(state, (spec.conv_width - 1, spec.conv_dim), shape, batch)
        out = torch.empty(count, spec.inner, dtype=self.out_dtype, device=projected.device)
        if count == 0:
            return out
        mixed = self.conv(projected, weights.conv_weight, weights.conv_bias, state.conv, slots, batch)
        y = torch.empty(count, spec.inner, dtype=torch.float32, device=projected.device)
        scan = self.scan_constants()
        selective_scan_kernel[(slots.shape[0], spec.num_heads, triton.cdiv(spec.head_dim, scan["DIMS"]))](
            mixed,
            projected,
            y,
            state.ssm,
            slots,
            batch.positions,
            batch.cu_seqlens_q,
            weights.a,
            weights.dt_bias,
            weights.d,
            weights.min_step,
            **scan,
            num_warps=4,
        )
        gated_norm_kernel[(count, spec.num_groups)](
            y, projected, weights.norm, out, weights.eps, **self.norm_constants(), num_warps=4
        )
        return out

    def scan_constants(self) -> dict[str, int]:
        spec = self.spec
        width = triton.next_power_of_2(spec.state_size)
        return {
            "HEADS": spec.num_heads,
            "HEAD_DIM": spec.head_dim,
            "STATE": spec.state_size,
            "STATE_WIDTH": width,
            "PER_GROUP": spec.num_heads // spec.num_groups,
            "CONV_DIM": spec.conv_dim,
            "STRIDE": self.stride,
            "STEPS": spec.inner + spec.conv_dim,
            "DIMS": state_rows(spec.head_dim, width),
        }

    def norm_constants(self) -> dict[str, Any]:
        group = self.spec.inner // self.spec.num_groups
        return {
            "GROUP": group,
            "GROUPS": self.spec.num_groups,
            "STRIDE": self.stride,
            "BLOCK": triton.next_power_of_2(group),
            "EMULATED": emulated(),
        }


def state_rows(rows: int, width: int) -> int:
    """How many of a head's `rows` rows of `width` values a program keeps: a power of two."""
    return int(min(triton.next_power_of_2(rows), max(1, _STATE_VALUES // width)))


def compilations() -> list[Compilation]:
    """Nemotron Nano 9B v2's."""
    kernel = TritonMamba2(Mamba2Spec(128, 80, 128, 8, 4, "bfloat16", "bfloat16"))
    scan = dict.fromkeys(("mixed", "out", "ssm", "a", "dt_bias", "d"), "*fp32") | {"projected": "*bf16"}
    scan |= {"slots": "*i64", "positions": "*i64", "bounds": "*i32", "min_step": "fp32"}
    norm = {"y": "*fp32", "projected": "*bf16", "weight": "*fp32", "out": "*bf16", "eps": "fp32"}
    return [
        Compilation("scan", selective_scan_kernel, scan, kernel.scan_constants(), expect=("MUFU.EX2",)),
        Compilation("gated_norm", gated_norm_kernel, norm, kernel.norm_constants(), expect=("MUFU.RSQ",)),
    ]
