"""ModelOpt's NVFP4 layout, whose names and meanings are the canonical ones: every scale multiplies.

weight           U8       [N, K/2]    even k in the low nibble
weight_scale     F8_E4M3  [N, K/16]   row-major; [N, K/32] in W4A8_NVFP4_FP8
weight_scale_2   F32      [] or [1]
input_scale      F32      [] or [1]   amax / 2688; absent in W4A16_NVFP4; amax / 448 (another meaning) in W4A8_NVFP4_FP8
pre_quant_scale  BF16     [K]         NVFP4_AWQ: the input is multiplied by it first
"""

from __future__ import annotations

import torch

from nvfp4_runtime.checkpoint.parts import Parts, usable
from nvfp4_runtime.nvfp4.codec import BLOCK
from nvfp4_runtime.nvfp4.weight import NVFP4Weight


def weight(parts: Parts) -> NVFP4Weight:
    """The canonical weight. An unusable input_scale counts as absent: so does W4A8's, which is made for FP8 inputs."""
    assert parts.scale is not None
    assert parts.tensor_scale is not None
    groups, rows = parts.tensor_scale.numel(), parts.weight.shape[0]
    block_scale, input_scale = parts.scale, parts.input_scale
    if (group := 2 * parts.weight.shape[1] // parts.scale.shape[1]) != BLOCK:
        # one scale for 32 weights is the same scale twice for 16: exact
        spread = parts.scale.view(torch.uint8).repeat_interleave(group // BLOCK, dim=1)
        block_scale, input_scale = spread.view(torch.float8_e4m3fn), None
    return NVFP4Weight(
        packed=parts.weight,
        block_scale=block_scale,
        weight_scale_2=parts.tensor_scale,
        group_rows=(rows // groups,) * groups,
        input_scale=input_scale if usable(input_scale) else None,
        bias=parts.bias,
        pre_quant_scale=parts.pre_quant_scale,
    )
