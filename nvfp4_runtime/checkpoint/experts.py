"""The experts of a mixture, one canonical weight each, from single matrices or from stacks of all of them.

prefix.E.gate_proj.weight, ...     one module per expert and projection (also as w1, w3, w2)
prefix.gate_up_proj  [E, 2I, K]    gate above up; gpt-oss alternates their rows
prefix.down_proj     [E, N, I]     or [E, I, N] where the exporter kept the order of batched multiplication
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.parts import Parts
from nvfp4_runtime.errors import UnsupportedFormatError
from nvfp4_runtime.nvfp4.weight import NVFP4Weight, Weight

ALIASES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # Mixtral's names
FUSED = "gate_up_proj"
HALVES = {"gate_proj": 0, "up_proj": 1}


def half_of(parts: Iterator[Parts], half: int, interleaved: bool) -> Iterator[Parts]:
    """gate (half 0) or up (half 1) of each expert's gate_up matrix.

    Raises UnsupportedFormatError where the matrix cannot be cut there: an odd number of rows, or FP8 blocks of rows
    that lie across the cut.
    """
    for part in parts:
        n = part.weight.shape[0]
        block = part.layer.block
        fp8_rows = block[0] if part.layer.format == "fp8" and block is not None and block[0] < n else 1
        if n % 2 or (fp8_rows > 1 and (interleaved or (n // 2) % fp8_rows)):
            raise UnsupportedFormatError(
                f"{part.layer.prefix} holds {n} rows of gate and up"
                + (f" under scales for {fp8_rows} rows each" if fp8_rows > 1 else "")
                + ", which cannot be cut into the two; export the model with one tensor per projection"
            )
        yield _cut(part, half, interleaved, fp8_rows)


def _cut(part: Parts, half: int, interleaved: bool, fp8_rows: int) -> Parts:
    n = part.weight.shape[0]

    def rows(tensor: Tensor, count: int) -> Tensor:
        if not interleaved:
            return tensor[half * count // 2 : (half + 1) * count // 2]
        if tensor.dtype.itemsize == 1:  # float8 cannot be gathered everywhere; bytes can
            return tensor.view(torch.uint8)[half::2].contiguous().view(tensor.dtype)
        return tensor[half::2].contiguous()

    scale = part.scale
    if scale is not None:
        if part.layer.format != "fp8":
            scale = rows(scale, n)
        elif scale.numel() > 1:  # per row, or per block of rows
            block = part.layer.block
            assert block is not None
            grid = scale.reshape(-(-n // block[0]), -1)
            scale = rows(grid, grid.shape[0]) if grid.shape[0] > 1 else grid
    tensor_scale = part.tensor_scale
    if tensor_scale is not None and tensor_scale.numel() == 2:
        tensor_scale = tensor_scale[half : half + 1]
    layer = part.layer
    if layer.format == "fp8" and layer.block is not None and layer.block[0] == n:  # one scale for all rows
        layer = replace(layer, block=(n // 2, layer.block[1]))
    bias = None if part.bias is None else rows(part.bias, n)
    return replace(part, layer=layer, weight=rows(part.weight, n), scale=scale, tensor_scale=tensor_scale, bias=bias)


def fill_input_scales(weights: Sequence[Weight]) -> tuple[list[Weight], int]:
    """NVFP4 experts without a usable input_scale get the largest of their layer; how many that were.

    The rule: an expert that calibration never reached is fed by the same tokens as its siblings, and the widest of
    their ranges cannot saturate more than theirs do. Where no expert has one, all stay weight-only.
    """
    known = [w.input_scale for w in weights if isinstance(w, NVFP4Weight) and w.input_scale is not None]
    missing = [i for i, w in enumerate(weights) if isinstance(w, NVFP4Weight) and w.input_scale is None]
    if not known or not missing:
        return list(weights), 0
    filled = list(weights)
    for i in missing:
        weight = filled[i]
        assert isinstance(weight, NVFP4Weight)
        filled[i] = replace(weight, input_scale=max(known))
    return filled, len(missing)
