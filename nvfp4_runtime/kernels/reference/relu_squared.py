"""relu(x)^2."""

from __future__ import annotations

import torch
from torch import Tensor


def relu_squared(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """See `ReluSquaredSpec`."""
    return x.relu().square().to(out_dtype)
