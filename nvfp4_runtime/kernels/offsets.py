"""The bounds of rows sorted by expert, checked before anybody reads rows by them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from nvfp4_runtime.errors import KernelError


def expert_bounds(offsets: Tensor, num_experts: int, num_rows: int) -> list[int]:
    """`offsets` as a list, if int32 [num_experts + 1] from 0 to `num_rows` and never falling; else KernelError."""
    if offsets.dtype != torch.int32 or tuple(offsets.shape) != (num_experts + 1,):
        raise KernelError(
            f"offsets: expected an int32 tensor [{num_experts + 1}] for {num_experts} experts, "
            f"found {offsets.dtype} {list(offsets.shape)}"
        )
    bounds: list[int] = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != num_rows:
        raise KernelError(
            f"offsets run from {bounds[0]} to {bounds[-1]}; x has {num_rows} rows: expected 0 to {num_rows}"
        )
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise KernelError(f"offsets[{expert + 1}] is {end}, below offsets[{expert}] = {start}; sort rows by expert")
    return bounds
