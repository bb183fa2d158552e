"""MXFP4 weights: gpt-oss's stacks and compressed-tensors' mxfp4-pack-quantized, both E2M1 under E8M0 scales.

P_blocks, P_scales            U8 [E, N, K/32, 16], U8 [E, N, K/32]   gpt-oss; gate and up rows alternate in gate_up_proj
weight_packed, weight_scale   U8 [N, K/2], U8 [N, K/32]              compressed-tensors
"""

from __future__ import annotations

from nvfp4_runtime.checkpoint.parts import Parts
from nvfp4_runtime.errors import UnsupportedFormatError
from nvfp4_runtime.nvfp4.mx import MXFP4Weight


def weight(parts: Parts) -> MXFP4Weight:
    """The canonical weight."""
    assert parts.scale is not None
    if parts.pre_quant_scale is not None:
        raise UnsupportedFormatError(f"{parts.layer.prefix} is MXFP4 with a pre_quant_scale, which is not applied here")
    return MXFP4Weight(parts.weight, parts.scale, parts.bias)
