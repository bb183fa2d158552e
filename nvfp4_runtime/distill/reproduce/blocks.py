"""Block formats taken apart: E2M1 values under scales of either kind, in blocks of either size, as errors.

float64 throughout, so that what is measured is the format and nothing of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from nvfp4_runtime.distill.fake_quant import round_e2m1
from nvfp4_runtime.nvfp4 import codec

ScaleKind = Literal["exact", "e4m3", "ocp", "nearest", "ceil", "floor"]
SCALE_KINDS: tuple[ScaleKind, ...] = get_args(ScaleKind)
SIZE = 1 << 20


def ideal_scale(x: Tensor, block: int) -> Tensor:
    """amax / 6 of each block, [..., blocks]; 1 for a block of zeros."""
    amax = x.reshape(-1, block).abs().amax(dim=1) / codec.E2M1_MAX
    return torch.where(amax == 0, torch.ones_like(amax), amax)


def encoded_scale(ideal: Tensor, kind: ScaleKind) -> Tensor:
    """The scale a format stores in the place of `ideal`.

    e4m3     under the FP32 tensor scale that gives the largest block 448
    ocp      2^(floor(log2 amax) - 2), Open Compute's rule for MXFP4; largest values saturate
    nearest, ceil, floor  powers of two by log2 of the ideal scale
    """
    if kind == "exact":
        return ideal
    if kind == "e4m3":
        tensor_scale = ideal.max() / codec.E4M3_MAX
        stored = (ideal / tensor_scale).clamp(codec.E4M3_MIN_SUBNORMAL, codec.E4M3_MAX)
        return stored.to(torch.float32).to(torch.float8_e4m3fn).to(torch.float64) * tensor_scale
    log = torch.log2(ideal)
    rule: dict[str, Callable[[], Tensor]] = {
        "ocp": lambda: torch.floor(torch.log2(ideal * codec.E2M1_MAX)) - 2,
        "nearest": lambda: torch.round(log),
        "ceil": lambda: torch.ceil(log),
        "floor": lambda: torch.floor(log),
    }
    return torch.exp2(rule[kind]())


def errors(x: Tensor, block: int, kind: ScaleKind) -> tuple[Tensor, Tensor]:
    """(rounded minus exact, ideal scale) of each value: float64 [blocks, block], [blocks, 1]."""
    x = x.to(torch.float64).reshape(-1, block)
    ideal = ideal_scale(x, block).unsqueeze(1)
    scale = encoded_scale(ideal.squeeze(1), kind).unsqueeze(1)
    return round_e2m1(x / scale) * scale - x, ideal


def nmse(x: Tensor, block: int, kind: ScaleKind) -> float:
    """Squared error over squared values."""
    error, _ = errors(x, block, kind)
    return float(error.square().sum() / x.to(torch.float64).square().sum())


def gaussian(seed: int = 0) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def laplace(seed: int = 0) -> Tensor:
    u = torch.rand(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


def outlier_channels(seed: int = 0) -> Tensor:
    """Gaussian rows of 1024 in which every 64th channel is 20 times larger, as activations of language models are."""
    x = gaussian(seed).reshape(-1, 1024)
    x[:, ::64] *= 20
    return x.flatten()
