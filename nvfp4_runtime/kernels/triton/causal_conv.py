"""The causal convolution before a recurrence, with SiLU, over each sequence's last inputs; and numbers both
recurrences need.

Every channel has taps of its own. The inputs before a step's first token lie in the sequence's slot; afterwards the
slot holds the last ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, StateLayer
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.compilation import Compilation

BLOCK = 256  # channels of a program
TOKENS = 8  # of a program, where prompts are computed


@triton.jit
def softplus(x):
    """log(1 + exp(x)) of float32, also where exp(x) is lost beside 1: the quotient undoes the sum's rounding."""
    small = tl.exp(-tl.abs(x))
    sum_ = 1.0 + small
    kept = tl.where(sum_ == 1.0, 1.0, sum_ - 1.0)
    log1p = tl.where(sum_ == 1.0, small, tl.log(sum_) * (small / kept))
    return tl.where(x > 0.0, x, 0.0) + log1p


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def keep_last(x, conv, slot, start, stop, fresh, col, CHANNELS, STRIDE, OFFSET, WIDTH: tl.constexpr):
    """The WIDTH - 1 last inputs of a sequence whose new ones are rows start .. stop of x, into its slot."""
    held = conv + slot * (WIDTH - 1) * CHANNELS + col
    for j in tl.static_range(WIDTH - 1):
        row = stop - (WIDTH - 1) + j
        # limits instead of conditions: the interpreter loses the type of a mask that is a scalar's and a vector's
        new = tl.where(row >= start, CHANNELS, 0)
        value = tl.load(x + row * STRIDE + OFFSET + col, mask=col < new, other=0.0).to(tl.float32)
        older = tl.where(fresh != 0, 0, CHANNELS - new)
        value += tl.load(held + (j + stop - start) * CHANNELS, mask=col < older, other=0.0)
        tl.debug_barrier()  # a row is read, by whichever thread, before it is written
        tl.store(held + j * CHANNELS, value, mask=col < CHANNELS)


@triton.jit(do_not_specialize=["rows"])
def causal_conv_kernel(
    x,
    conv,
    out,
    weight,
    bias,
    slots,
    positions,
    bounds,
    sequences,
    rows,
    CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    DECODES: tl.constexpr,
):
    """Program (i, c): tokens i * TOKENS .., channels c * BLOCK .. of x [T, STRIDE] from column OFFSET on.

    conv       fp32 [slots, WIDTH - 1, CHANNELS]
    out        fp32 [T, CHANNELS]
    weight     fp32 [CHANNELS, WIDTH]     bias  fp32 [CHANNELS]
    sequences  int64 [T]: each token's; not read where DECODES
    DECODES    token t is sequence t's only one (TOKENS is 1): its slot is updated as well
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there, inside = token < rows, col < CHANNELS
    if DECODES:
        seq = token
        start = token
    else:
        seq = tl.load(sequences + token, mask=there, other=0)
        start = tl.load(bounds + seq, mask=there, other=0).to(tl.int64)
    slot = tl.load(slots + seq, mask=there, other=0)
    fresh = (tl.load(positions + start, mask=there, other=0) == 0).to(tl.int32)
    acc = tl.zeros([TOKENS, BLOCK], tl.float32)
    for w in tl.static_range(WIDTH):
        row = token - (WIDTH - 1) + w
        new = there & (row >= start)
        older = there & (row < start) & (fresh == 0)
        held = slot * (WIDTH - 1) + (row - start + WIDTH - 1)
        at = row[:, None] * STRIDE + OFFSET + col[None, :]
        value = tl.load(x + at, mask=new[:, None] & inside[None, :], other=0.0).to(tl.float32)
        at = held[:, None] * CHANNELS + col[None, :]
        value += tl.load(conv + at, mask=older[:, None] & inside[None, :], other=0.0)
        acc += value * tl.load(weight + col * WIDTH + w, mask=inside, other=0.0)[None, :]
    acc += tl.load(bias + col, mask=inside, other=0.0)[None, :]
    at = token[:, None] * CHANNELS + col[None, :]
    tl.store(out + at, silu(acc), mask=there[:, None] & inside[None, :])
    if DECODES:
        only = tl.program_id(0).to(tl.int64)
        slot = tl.load(slots + only)
        fresh = (tl.load(positions + only) == 0).to(tl.int32)
        keep_last(x, conv, slot, only, only + 1, fresh, col, CHANNELS, STRIDE, OFFSET, WIDTH)


@triton.jit
def keep_last_kernel(
    x,
    conv,
    slots,
    positions,
    bounds,
    CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (b, c): channels c * BLOCK .. of sequence b's slot."""
    seq = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(bounds + seq).to(tl.int64)
    stop = tl.load(bounds + seq + 1).to(tl.int64)
    fresh = (tl.load(positions + start, mask=start < stop, other=1) == 0).to(tl.int32)
    keep_last(x, conv, tl.load(slots + seq), start, stop, fresh, col, CHANNELS, STRIDE, OFFSET, WIDTH)


@dataclass(frozen=True)
class CausalConv:
    """The convolution of `channels` columns of rows of `stride`, from column `offset` on."""

    channels: int
    width: int
    stride: int
    offset: int

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, conv: Tensor, slots: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """x [T, stride], T at least 1 -> fp32 [T, channels]; `conv` keeps every sequence's last inputs."""
        rows = x.shape[0]
        out = torch.empty(rows, self.channels, dtype=torch.float32, device=x.device)
        decodes = batch.max_query_len == 1
        tokens = 1 if decodes else TOKENS
        blocks = triton.cdiv(self.channels, BLOCK)
        causal_conv_kernel[(triton.cdiv(rows, tokens), blocks)](
            x,
            conv,
            out,
            weight,
            bias,
            slots,
            batch.positions,
            batch.cu_seqlens_q,
            batch.positions if decodes else batch.sequence_of_token,
            rows,
            **self.constants(),
            TOKENS=tokens,
            DECODES=decodes,
            num_warps=4,
        )
        if not decodes:
            keep_last_kernel[(slots.shape[0], blocks)](
                x, conv, slots, batch.positions, batch.cu_seqlens_q, **self.constants(), num_warps=4
            )
        return out

    def constants(self) -> dict[str, int]:
        return {
            "CHANNELS": self.channels,
            "STRIDE": self.stride,
            "OFFSET": self.offset,
            "WIDTH": self.width,
            "BLOCK": BLOCK,
        }


def check_states(state: StateLayer, conv: tuple[int, ...], ssm: tuple[int, ...], batch: ForwardBatch) -> Tensor:
    """The batch's slots, once they and the states have the types and shapes kernels read: [slots, *conv] and
    [slots, *ssm], contiguous float32. What slots and bounds say is not checked: that would wait for the device."""
    for name, tensor, shape in (("conv", state.conv, conv), ("ssm", state.ssm, ssm)):
        if tensor.dtype != torch.float32 or tensor.shape[1:] != shape or not tensor.is_contiguous():
            raise KernelError(
                f"state.{name}: expected contiguous float32 [slots, {', '.join(map(str, shape))}], found "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
    slots = batch.state_slots
    if slots is None:
        raise KernelError("a layer that keeps states needs batch.state_slots, found None")
    if batch.cu_seqlens_q.shape[0] != slots.shape[0] + 1:
        raise KernelError(f"cu_seqlens_q has {batch.cu_seqlens_q.shape[0]} bounds for {slots.shape[0]} state_slots")
    return slots


def check_rows(name: str, tensor: Tensor, dtype: torch.dtype, count: int, width: int) -> None:
    if tensor.dtype != dtype or tensor.shape != (count, width) or not tensor.is_contiguous():
        raise KernelError(
            f"{name}: expected contiguous {dtype} [{count}, {width}], found {tensor.dtype} {list(tensor.shape)}"
        )


def compilations() -> list[Compilation]:
    """Nemotron Nano 9B v2's: 10240 inner channels, 8 groups, states of 128, 128 heads."""
    conv = CausalConv(12288, 4, 10240 + 12288 + 128, 10240)
    states = dict.fromkeys(("slots", "positions"), "*i64") | {"x": "*bf16", "conv": "*fp32", "bounds": "*i32"}
    more = dict.fromkeys(("out", "weight", "bias"), "*fp32") | {"sequences": "*i64", "rows": "i32"}
    made = [
        Compilation(
            name=name,
            kernel=causal_conv_kernel,
            signature=states | more,
            constexprs=conv.constants() | {"TOKENS": tokens, "DECODES": tokens == 1},
            expect=("MUFU.EX2",),
            unaligned=("rows",),
        )
        for name, tokens in (("decode", 1), ("prompt", TOKENS))
    ]
    return [*made, Compilation("keep_last", keep_last_kernel, states, conv.constants())]
