"""The gated activation of a SwiGLU feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor


def silu_mul(gate_up: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """silu(gate) * up: [T, 2I], gate in the first I columns -> [T, I]; FP32 inside, rounded once."""
    gate, up = gate_up.to(torch.float32).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(out_dtype)
