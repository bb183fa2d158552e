"""The plain dialect: weights stored as BF16, FP16 or FP32."""

from __future__ import annotations

from nvfp4_runtime.checkpoint.parts import Parts
from nvfp4_runtime.errors import UnsupportedFormatError
from nvfp4_runtime.nvfp4.weight import DenseWeight


def weight(parts: Parts) -> DenseWeight:
    """The weight as it lies in the file. Raises UnsupportedFormatError for a pre_quant_scale, which is not applied."""
    if parts.pre_quant_scale is not None:
        raise UnsupportedFormatError(f"{parts.layer.prefix} is plain with a pre_quant_scale, which is not applied here")
    return DenseWeight(parts.weight, parts.bias)
