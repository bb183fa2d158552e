"""Where training begins: for every NVFP4 layer of the student, float32 weights that round to it.

A student's codes say where its weights lie to half a step. Weights inside their steps move to the next code sooner than
weights in the middle, and the teacher knows where they were: its weights, times the factors that AWQ folded into them.
Any factors that undo each other leave the function as it is, so those that are not stored (behind v_proj and up_proj)
may be estimated.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_runtime.distill.fake_quant import weight_operand
from nvfp4_runtime.nvfp4.weight import NVFP4Weight
from nvfp4_runtime.quantize.layerwise import SITE_MODULES

logger = logging.getLogger(__name__)

SAME_CODES = 0.97  # a layer whose codes the teacher's weights give to this share was rounded from them
_NORM_BEFORE = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}
_LINEAR_BEFORE = {"o": "self_attn.v_proj", "down": "mlp.up_proj"}


@dataclass
class Start:
    """Float32 weights by module name; `recovered` counts those taken from the teacher, the others are dequantised."""

    weights: dict[str, Tensor]
    recovered: int


def starting_weights(
    student: Mapping[str, NVFP4Weight], teacher: Mapping[str, Tensor], norms: Mapping[str, Tensor], heads: int
) -> Start:
    """student  module -> its NVFP4 weight;  teacher  module -> its plain weight, and norm name -> its weight
    norms    norm name -> the student's weight;  heads  query heads, which share value heads in groups
    """
    columns, rows = _factors(student, teacher, norms, heads)
    weights, recovered = dict[str, Tensor](), 0
    for module, weight in student.items():
        plain = teacher[module].to(torch.float32)
        if module in columns:
            plain = plain * columns[module]
        if module in rows:
            plain = plain / rows[module].unsqueeze(1)
        if (same := _same_codes(plain, weight)) >= SAME_CODES:
            weights[module] = plain
            recovered += 1
        else:
            weights[module] = weight.dequantize()
            logger.debug("%s: the teacher's weights give %.1f %% of its codes; dequantised", module, 100 * same)
    return Start(weights, recovered)


def _factors(
    student: Mapping[str, NVFP4Weight], teacher: Mapping[str, Tensor], norms: Mapping[str, Tensor], heads: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What AWQ multiplied: columns by module, and what it divided: rows by module."""
    columns, rows = dict[str, Tensor](), dict[str, Tensor]()
    layers = sorted({module.split(".self_attn.")[0].split(".mlp.")[0] for module in student})
    for layer in layers:
        for site, norm in _NORM_BEFORE.items():
            name = f"{layer}.{norm}"
            if name in norms and name in teacher:
                ours, theirs = norms[name].to(torch.float32), teacher[name].to(torch.float32)
                factor = torch.where(ours == 0, torch.ones_like(ours), theirs / ours)
                columns |= {f"{layer}.{m}": factor for m in SITE_MODULES[site] if f"{layer}.{m}" in student}
        for site, producer in _LINEAR_BEFORE.items():
            before, (after,) = f"{layer}.{producer}", (f"{layer}.{m}" for m in SITE_MODULES[site])
            if before in student and after in student:
                plain = teacher[before].to(torch.float32) * columns.get(before, torch.ones(()))
                factor = _row_factor(plain, student[before])
                rows[before] = factor
                columns[after] = _per_input(factor, teacher[after].shape[1], heads if site == "o" else None)
    return columns, rows


def _row_factor(plain: Tensor, weight: NVFP4Weight) -> Tensor:
    """For each row, what `plain` was divided by before it was rounded to `weight`; ones where it was not folded."""
    ones = torch.ones(plain.shape[0])
    if _same_codes(plain, weight) >= SAME_CODES:
        return ones
    rounded = weight.dequantize()  # the least squares' answer
    factor = plain.square().sum(dim=1) / (plain * rounded).sum(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(torch.isfinite(factor) & (factor > 0), factor, ones)


def _same_codes(plain: Tensor, weight: NVFP4Weight) -> float:
    """The share of `weight`'s codes that `plain` rounds to under its scales."""
    operand = weight_operand(plain, weight.block_scale, weight.weight_scale_2[0])
    return float((operand == weight.operand().to(torch.float32)).to(torch.float32).mean())


def _per_input(factor: Tensor, k: int, heads: int | None) -> Tensor:
    """The rows' factor for each input of the linear after it: value heads serve several query heads."""
    if heads is None or factor.numel() == k:
        return factor
    head_dim = k // heads
    return factor.reshape(-1, head_dim).repeat_interleave(k // factor.numel(), dim=0).flatten()
