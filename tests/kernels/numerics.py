"""Every arithmetic of NVFP4 layers, for tests that must hold in all of them: a new one needs one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.kernels.ops import LinearSpec
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.weight import NVFP4Weight

INPUT_SCALE = 0.0017

# numerics -> what x becomes before it is multiplied, exactly, fp64 [M, K], without input_scale
NUMERICS: dict[str, Callable[[Tensor], Tensor]] = {
    "w4a16": lambda x: x.double(),
    "w4a8": lambda x: codec.int8_operand(x).double(),
    "w4a4": lambda x: codec.activation_operand(x, torch.tensor(INPUT_SCALE)).double(),
}
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def spec(weight: NVFP4Weight, numerics: Any, dtype: Any = "bfloat16", out_dtype: Any = "float32") -> LinearSpec:
    return LinearSpec(weight.n, weight.k, "nvfp4", numerics, dtype, out_dtype)


def worst_excess(y: Tensor, x: Tensor, weight: NVFP4Weight, numerics: str) -> float:
    """How far `y` is beyond its bound, fp64 arithmetic being exact here; at most 0 where all is well.

    A row with NaN or infinity in x counts as correct if nothing in it is finite (W4A4 saturates an infinity instead, so
    there such a row only has to agree wherever it is finite in both).
    """
    w = weight.operand().double().t()
    scale = weight.row_scale_2().double() * (float(torch.tensor(INPUT_SCALE)) if numerics == "w4a4" else 1.0)
    operand = NUMERICS[numerics](x)
    usable = operand.isfinite().all(dim=1)
    spoilt = y[~usable]
    if numerics != "w4a4" and spoilt.numel() and bool(spoilt.isfinite().any()):
        return float("inf")
    operand, y, x = operand[usable], y[usable], x[usable]
    if not y.numel():
        return 0.0
    exact = (operand @ w) * scale
    # NativeLinearNVFP4: K/16 + 18 roundings; input_scale * weight_scale_2 is one more
    room = (weight.k / 16 + 19) * 2.0**-24 * (operand.abs() @ w.abs())
    if numerics == "w4a16" and x.dtype == torch.bfloat16:  # perhaps as two int8 digits, or subnormals as zero
        amax = x.double().abs().unflatten(1, (-1, 16)).amax(dim=2).repeat_interleave(16, dim=1)
        room = room + (amax * (0.5 / 32512) + x.double().abs() * 2.0**-22 + 2.0**-100) @ w.abs()
    room = room * scale
    if weight.bias is not None:
        exact = exact + weight.bias.double()
        room = room + 2.0**-24 * exact.abs()
    # one rounding to y's type; 2^-132 is two steps of a subnormal bfloat16, more than float32's underflows add up to
    room = room + {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}[y.dtype] * exact.abs() + 2.0**-132
    return float(((y.double() - exact).abs() - room).nan_to_num(nan=float("inf")).max())
