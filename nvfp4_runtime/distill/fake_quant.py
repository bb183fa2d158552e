"""NVFP4 rounding as arithmetic on whole tensors: the reference quantiser's values, bit for bit, at training's speed.

`nvfp4.codec` defines correct; it makes codes and looks them up. Here values are rounded where they lie, which is
several times faster and runs on any device. tests/distill/test_fake_quant.py holds the two equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.nvfp4 import codec


def round_e2m1(y: Tensor) -> Tensor:
    """The nearest E2M1 value of each float32: ties to the even code, saturating at 6, sign of zero kept."""
    magnitude = y.abs()
    # steps of E2M1 are 0.5 below 2, 1 below 4, then 2: halving and doubling are exact, `round` is half to even
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    return (torch.round(y / step) * step).clamp_(-codec.E2M1_MAX, codec.E2M1_MAX)


def activation_operand(x: Tensor, input_scale: Tensor) -> Tensor:
    """`codec.activation_operand`: code * block scale of [..., K] as bfloat16; input_scale, fp32 [], is left out."""
    blocks = x.reshape(*x.shape[:-1], -1, codec.BLOCK).to(torch.float32)
    global_scale = 1.0 / input_scale
    sixth = torch.full((), 1.0 / 6.0, dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(blocks, dim=-1, keepdim=True)
    amax = torch.maximum(high, -low)
    scale = (global_scale * (amax * sixth)).clamp_(max=codec.E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1.0 / (scale * (1.0 / global_scale)))
    return (round_e2m1(blocks * inverse) * scale).to(torch.bfloat16).reshape(x.shape)


def weight_operand(w: Tensor, block_scale: Tensor, scale_2: Tensor) -> Tensor:
    """code * block scale of the weights [N, K] under given scales, float32 (bfloat16 holds it); scale_2 is left out.

    block_scale  e4m3 [N, K/16];  scale_2  fp32 []
    The codes are those of `codec.encode_blocks`.
    """
    blocks = w.reshape(w.shape[0], -1, codec.BLOCK)
    scale = block_scale.to(torch.float32).unsqueeze(-1)
    step = scale * scale_2
    codes = round_e2m1(torch.where(step == 0, blocks * 0, blocks / step))
    return (codes * scale).reshape(w.shape)


def max_block_scales(w: Tensor, scale_2: Tensor) -> Tensor:
    """Block scales e4m3 [N, K/16] from each block's maximum under a frozen tensor scale, as `codec.quantize` does."""
    amax = w.reshape(w.shape[0], -1, codec.BLOCK).abs().amax(dim=-1)
    scale = amax / (codec.E2M1_MAX * scale_2)
    scale = torch.where((scale == 0) | (scale_2 == 0), torch.ones_like(scale), scale)
    return scale.clamp(codec.E4M3_MIN_SUBNORMAL, codec.E4M3_MAX).to(torch.float8_e4m3fn)
