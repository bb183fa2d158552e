"""compressed-tensors' nvfp4-pack-quantized: ModelOpt's bytes under other names, with global scales that divide.

weight_packed        U8       [N, K/2]    even k in the low nibble
weight_scale         F8_E4M3  [N, K/16]   row-major
weight_global_scale  F32      [1]         2688 / amax, computed in the weight's type; never to be recomputed
input_global_scale   F32      [1]         absent in NVFP4A16

The tool's weight is e2m1 * (scale / global), a quotient in float32. scale * (1 / global) differs from it by a last bit
now and then, so the divisor is kept beside its reciprocal: `dequantize` divides as the tool does.
"""

from __future__ import annotations

import torch

from nvfp4_runtime.checkpoint.parts import Parts, usable
from nvfp4_runtime.nvfp4.weight import NVFP4Weight


def weight(parts: Parts) -> NVFP4Weight:
    """The canonical weight: both global scales are inverted here, once, and nowhere else."""
    assert parts.scale is not None
    assert parts.tensor_scale is not None
    groups, rows = parts.tensor_scale.numel(), parts.weight.shape[0]
    return NVFP4Weight(
        packed=parts.weight,
        block_scale=parts.scale,
        weight_scale_2=torch.reciprocal(parts.tensor_scale),
        group_rows=(rows // groups,) * groups,
        input_scale=inverted(parts.input_scale),
        bias=parts.bias,
        divisor=parts.tensor_scale,
        pre_quant_scale=parts.pre_quant_scale,
    )


def inverted(divisor: float | None) -> float | None:
    """The multiplier to a stored divisor; None where there is none or it cannot be inverted."""
    if divisor is None or not usable(divisor):
        return None
    return float(1.0 / torch.tensor(divisor, dtype=torch.float32))
