"""Runs of rows or columns of a canonical weight: what one rank of a team holds. Views wherever memory allows.

Codes, block scales and row groups' scales stay as they are, so a part dequantises to the same bits as the whole does
there. Rows of a mapped file stay mapped; of columns only the wanted ones are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nvfp4_runtime.errors import NVFP4ShapeError
from nvfp4_runtime.nvfp4 import mx
from nvfp4_runtime.nvfp4.codec import BLOCK
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight, fuse


def rows(weight: Weight, runs: Sequence[range]) -> Weight:
    """The rows of `runs`, one below the other, with their scales and biases."""
    if isinstance(weight, FP8Weight) and any(run.start % weight.block[0] for run in runs):
        weight = _scaled_by_row(weight)
    parts = [_rows(weight, run) for run in runs]
    return parts[0] if len(parts) == 1 else fuse(parts)


def columns(weight: Weight, run: range, with_bias: bool) -> Weight:
    """The columns of `run`. What several parts give is summed, so only one of them may add the bias.

    Raises NVFP4ShapeError for a cut through a block of values under one scale.
    """
    bias = weight.bias if with_bias else None
    if isinstance(weight, DenseWeight):
        return DenseWeight(_columns(weight.weight, run, 1), bias)
    if isinstance(weight, FP8Weight):
        return _fp8_columns(weight, run, bias)
    if isinstance(weight, MXFP4Weight):
        packed, scale = _columns(weight.packed, run, 2, mx.BLOCK), _columns(weight.block_scale, run, mx.BLOCK)
        return MXFP4Weight(packed, scale, bias)
    pre = weight.pre_quant_scale
    return NVFP4Weight(
        packed=_columns(weight.packed, run, 2, BLOCK),
        block_scale=_columns(weight.block_scale, run, BLOCK),
        weight_scale_2=weight.weight_scale_2,
        group_rows=weight.group_rows,
        input_scale=weight.input_scale,
        bias=bias,
        divisor=weight.divisor,
        pre_quant_scale=None if pre is None else pre[run.start : run.stop].contiguous(),
    )


def _rows(weight: Weight, run: range) -> Weight:
    assert 0 <= run.start < run.stop <= weight.n, f"rows {run} of {weight.n}"
    if run == range(weight.n):
        return weight
    start, stop = run.start, run.stop
    bias = None if weight.bias is None else weight.bias[start:stop]
    if isinstance(weight, DenseWeight):
        return DenseWeight(weight.weight[start:stop], bias)
    if isinstance(weight, FP8Weight):
        return _fp8_rows(weight, run, bias)
    if isinstance(weight, MXFP4Weight):
        return MXFP4Weight(weight.packed[start:stop], weight.block_scale[start:stop], bias)
    kept, group_rows, end = [], [], 0
    for i, count in enumerate(weight.group_rows):
        first, end = end, end + count
        if (inside := min(stop, end) - max(start, first)) > 0:
            kept.append(i)
            group_rows.append(inside)
    return NVFP4Weight(
        packed=weight.packed[start:stop],
        block_scale=weight.block_scale[start:stop],
        weight_scale_2=weight.weight_scale_2[kept],
        group_rows=tuple(group_rows),
        input_scale=weight.input_scale,
        bias=bias,
        divisor=None if weight.divisor is None else weight.divisor[kept],
        pre_quant_scale=weight.pre_quant_scale,
    )


def _fp8_rows(weight: FP8Weight, run: range, bias: Tensor | None) -> FP8Weight:
    high = weight.block[0]
    scale = weight.scale[run.start // high : -(-run.stop // high)]
    codes, block = weight.codes[run.start : run.stop], (min(high, len(run)), weight.block[1])
    return replace(weight, codes=codes, scale=scale, block=block, bias=bias)


def _scaled_by_row(weight: FP8Weight) -> FP8Weight:
    """The same scales, a row each: such rows can be cut anywhere."""
    scale = weight.scale.repeat_interleave(weight.block[0], dim=0)[: weight.n]
    return replace(weight, scale=scale, block=(1, weight.block[1]))


def _fp8_columns(weight: FP8Weight, run: range, bias: Tensor | None) -> FP8Weight:
    codes, wide = _columns(weight.codes, run, 1), weight.block[1]
    if weight.scales_rows:
        return replace(weight, codes=codes, block=(weight.block[0], len(run)), bias=bias)
    scale = _columns(weight.scale, run, wide, last=weight.k)
    return replace(weight, codes=codes, scale=scale, block=(weight.block[0], min(wide, len(run))), bias=bias)


def _columns(values: Tensor, run: range, per_value: int, block: int | None = None, last: int | None = None) -> Tensor:
    """Columns `run`, of which `per_value` share one stored value, and cuts lie between `block`s of them.

    last  where the final block may end early
    """
    block = block or per_value
    if run.start % block or (run.stop % block and run.stop != last):
        raise NVFP4ShapeError(f"columns {run.start} to {run.stop} cut through a block of {block} under one scale")
    stop = -(-run.stop // per_value)
    cut = values.view(torch.uint8) if values.dtype.itemsize == 1 else values  # float8 is not copied everywhere
    return cut[:, run.start // per_value : stop].contiguous().view(values.dtype)
