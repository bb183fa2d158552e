"""FP8 weights in every spelling: E4M3 codes under scales per tensor, per row, or per block, which all multiply.

weight            F8_E4M3  [N, K]
weight_scale      F32 [] or [1]                   ModelOpt FP8, compressed-tensors "tensor"
                  F32 [N], BF16 or F32 [N, 1]     FP8_PER_CHANNEL_PER_TOKEN, compressed-tensors "channel"
                  F32 [N/128, 1, K/128, 1]        ModelOpt FP8_PB_WO
                  [ceil(N/128), ceil(K/128)]      compressed-tensors "block"
weight_scale_inv  F32 [ceil(N/128), ceil(K/128)]  DeepSeek; a multiplier, whatever its name says
input_scale       F32 [] or [1]                   kept for W8A8; W8A16, which runs here, has no use for it
"""

from __future__ import annotations

from nvfp4_runtime.checkpoint.parts import Parts, usable
from nvfp4_runtime.errors import UnsupportedFormatError
from nvfp4_runtime.nvfp4.fp8 import FP8Weight


def weight(parts: Parts) -> FP8Weight:
    """The canonical weight. Raises UnsupportedFormatError for a pre_quant_scale, which nothing here applies to FP8."""
    assert parts.scale is not None
    assert parts.layer.block is not None
    if parts.pre_quant_scale is not None:
        raise UnsupportedFormatError(
            f"{parts.layer.prefix} is FP8 with a pre_quant_scale (SmoothQuant, W4A8_AWQ), which is not applied here; "
            "export the model as NVFP4 or FP8 without it"
        )
    n, k = parts.weight.shape
    rows, columns = parts.layer.block
    return FP8Weight(
        codes=parts.weight,
        scale=parts.scale.reshape(-(-n // rows), -(-k // columns)),
        block=(rows, columns),
        input_scale=parts.input_scale if usable(parts.input_scale) else None,
        bias=parts.bias,
    )
