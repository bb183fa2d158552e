"""The activation of a gated feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.config import SILU, Gate


def silu_mul(gate_up: Tensor, *, out_dtype: torch.dtype, by: Gate = SILU) -> Tensor:
    """silu(gate) * up, or what `by` says: [T, 2I], gate in the first I columns -> [T, I]; FP32 inside, rounded once."""
    gate, up = gate_up.to(torch.float32).chunk(2, dim=-1)
    match by.form:
        case "silu":
            y = torch.nn.functional.silu(gate) * up
        case "gelu_tanh":
            y = torch.nn.functional.gelu(gate, approximate="tanh") * up
        case "clamped":
            gate, up = gate.clamp(max=by.limit), up.clamp(-by.limit, by.limit)
            y = gate * torch.sigmoid(by.alpha * gate) * (up + 1)
    return y.to(out_dtype)
