"""The gated delta rule behind its convolution: two launches, three where prompts are computed.

The rule goes token by token, states in registers, as mamba2.py's scan does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, StateLayer
from nvfp4_runtime.kernels.compilation import Compilation
from nvfp4_runtime.kernels.ops import DeltaSpec, DeltaWeights
from nvfp4_runtime.kernels.triton.causal_conv import CausalConv, check_rows, check_states, softplus
from nvfp4_runtime.kernels.triton.mamba2 import state_rows


@triton.jit
def delta_rule_kernel(
    mixed,
    b,
    dt,
    out,
    ssm,
    slots,
    positions,
    bounds,
    a,
    dt_bias,
    HEADS: tl.constexpr,
    PER_KEY: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    CONV_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    QUERY_SCALE: tl.constexpr,
):
    """Program (b, h, p): rows p * DIMS .. of value head h's state, over the new tokens of sequence b.

    mixed      fp32 [T, CONV_DIM]: q, k and v after the convolution
    b, dt      [T, HEADS]
    out        fp32 [T, HEADS * VALUE_DIM]
    ssm        fp32 [slots, HEADS, VALUE_DIM, KEY_DIM]
    PER_KEY    value heads of a key head           KEY_WIDTH  KEY_DIM padded to a power of two
    """
    seq = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    col = tl.arange(0, KEY_WIDTH)
    inside, used = dim < VALUE_DIM, col < KEY_DIM
    start = tl.load(bounds + seq).to(tl.int64)
    stop = tl.load(bounds + seq + 1).to(tl.int64)
    first = tl.load(positions + start, mask=start < stop, other=0)
    slot = tl.load(slots + seq)
    at = ((slot * HEADS + head) * VALUE_DIM + dim)[:, None] * KEY_DIM + col[None, :]
    # a limit instead of a condition: see keep_last
    begun = col < tl.where(first != 0, KEY_DIM, 0)
    state = tl.load(ssm + at, mask=inside[:, None] & begun[None, :], other=0.0)
    rate = tl.load(a + head)
    shift = tl.load(dt_bias + head)
    q_at = (head // PER_KEY) * KEY_DIM
    k_at = (HEADS // PER_KEY) * KEY_DIM + q_at
    v_at = 2 * (HEADS // PER_KEY) * KEY_DIM + head * VALUE_DIM
    for t in range(start, stop):
        row = mixed + t * CONV_DIM
        q = tl.load(row + q_at + col, mask=used, other=0.0)
        k = tl.load(row + k_at + col, mask=used, other=0.0)
        v = tl.load(row + v_at + dim, mask=inside, other=0.0)
        q *= tl.rsqrt(tl.sum(q * q, axis=0) + 1e-6) * QUERY_SCALE
        k *= tl.rsqrt(tl.sum(k * k, axis=0) + 1e-6)
        beta = 1.0 / (1.0 + tl.exp(-tl.load(b + t * HEADS + head).to(tl.float32)))
        step = softplus(tl.load(dt + t * HEADS + head).to(tl.float32) + shift)
        state *= tl.exp(step * rate)
        wanted = beta * (v - tl.sum(state * k[None, :], axis=1))
        state += wanted[:, None] * k[None, :]
        y = tl.sum(state * q[None, :], axis=1)
        tl.store(out + t * (HEADS * VALUE_DIM) + head * VALUE_DIM + dim, y, mask=inside)
    advanced = col < tl.where(start < stop, KEY_DIM, 0)
    tl.store(ssm + at, state, mask=inside[:, None] & advanced[None, :])


class TritonDelta:
    """See `DeltaKernel`. Slots and bounds are not checked. A sequence's result depends on its tokens alone."""

    def __init__(self, spec: DeltaSpec, device: torch.device) -> None:
        self.spec = spec
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.conv = CausalConv(spec.conv_dim, spec.conv_width, spec.conv_dim, 0)
        self.no_bias = torch.zeros(spec.conv_dim, device=device)

    def __call__(
        self, qkv: Tensor, b: Tensor, dt: Tensor, weights: DeltaWeights, state: StateLayer, batch: ForwardBatch
    ) -> Tensor:
        spec, count = self.spec, qkv.shape[0]
        check_rows("qkv", qkv, self.dtype, count, spec.conv_dim)
        for name, values in (("b", b), ("dt", dt)):
            check_rows(name, values, self.dtype, count, spec.num_value_heads)
        shape = (spec.num_value_heads, spec.value_dim, spec.key_dim)
        slots = check_states(state, (spec.conv_width - 1, spec.conv_dim), shape, batch)
        out = torch.empty(count, spec.values, dtype=torch.float32, device=qkv.device)
        if count == 0:
            return out
        mixed = self.conv(qkv, weights.conv_weight, self.no_bias, state.conv, slots, batch)
        constants = self.constants()
        delta_rule_kernel[(slots.shape[0], spec.num_value_heads, triton.cdiv(spec.value_dim, constants["DIMS"]))](
            mixed,
            b,
            dt,
            out,
            state.ssm,
            slots,
            batch.positions,
            batch.cu_seqlens_q,
            weights.a,
            weights.dt_bias,
            **constants,
            num_warps=4,
        )
        return out

    def constants(self) -> dict[str, int | float]:
        spec = self.spec
        width = triton.next_power_of_2(spec.key_dim)
        return {
            "HEADS": spec.num_value_heads,
            "PER_KEY": spec.num_value_heads // spec.num_key_heads,
            "VALUE_DIM": spec.value_dim,
            "KEY_DIM": spec.key_dim,
            "KEY_WIDTH": width,
            "CONV_DIM": spec.conv_dim,
            "DIMS": state_rows(spec.value_dim, width),
            "QUERY_SCALE": spec.key_dim**-0.5,
        }


def compilations() -> list[Compilation]:
    """Qwen3-Next's."""
    kernel = TritonDelta(DeltaSpec(16, 32, 128, 128, 4, "bfloat16"), torch.device("cpu"))
    signature = dict.fromkeys(("mixed", "out", "ssm", "a", "dt_bias"), "*fp32") | {"b": "*bf16", "dt": "*bf16"}
    signature |= {"slots": "*i64", "positions": "*i64", "bounds": "*i32"}
    return [
        Compilation("delta_rule", delta_rule_kernel, signature, kernel.constants(), expect=("MUFU.RSQ", "MUFU.EX2"))
    ]
