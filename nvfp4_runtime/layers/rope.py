"""Rotary embedding: inverse frequencies of each variant, and the tables of cosines and sines the kernels read."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from nvfp4_runtime.config import RopeConfig
from nvfp4_runtime.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_TABLE_BYTES = 1 << 30  # 2 million positions of 128 dimensions


def rope_tables(rope: RopeConfig, rotary_dim: int, max_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, times the variant's attention factor.

    returns  fp32 [max_positions, rotary_dim / 2] each, the values transformers computes (it repeats them twice)

    Raises ConfigError when they would take more than 1 GiB: a config.json may claim any context length.
    """
    if (num_bytes := 4 * max_positions * rotary_dim) > MAX_TABLE_BYTES:
        raise ConfigError(
            f"a context of {max_positions} tokens needs {num_bytes / 2**30:.1f} GiB of rotary tables, more than "
            f"{MAX_TABLE_BYTES / 2**30:.0f}; lower --max-model-len",
            "--max-model-len",
        )
    long = rope.kind == "longrope" and max_positions > rope.original_max_position_embeddings
    if long:
        logger.info(
            "rotary embedding: long_factor serves every position, since contexts may reach %d tokens, beyond the "
            "original %d; --max-model-len %d or less takes short_factor",
            max_positions,
            rope.original_max_position_embeddings,
            rope.original_max_position_embeddings,
        )
    frequencies, attention_factor = inverse_frequencies(rope, rotary_dim, long)
    angles = torch.arange(max_positions, dtype=torch.float32).unsqueeze(1) * frequencies
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def query_scales(rope: RopeConfig, max_positions: int) -> Tensor | None:
    """What turned queries are multiplied by, fp32 [max_positions]; None where that is 1 everywhere."""
    original = rope.original_max_position_embeddings
    if not rope.query_beta or max_positions <= original:
        return None
    return 1 + rope.query_beta * torch.log(1 + torch.floor(torch.arange(max_positions) / original))


def inverse_frequencies(rope: RopeConfig, rotary_dim: int, long: bool = False) -> tuple[Tensor, float]:
    """Radians per position, fp32 [rotary_dim / 2], and the factor on cos and sin (1 except for YaRN and LongRoPE).

    long  LongRoPE's factors for contexts beyond the original one
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    wavelengths = rope.theta**exponents  # in positions, over 2 pi
    if rope.kind == "linear":
        return 1.0 / wavelengths / rope.factor, 1.0
    if rope.kind == "proportional":
        turning = torch.arange(rotary_dim // 2) < int(rope.partial_rotary_factor * rotary_dim // 2)
        return torch.where(turning, 1.0 / wavelengths, torch.zeros(())) / rope.factor, 1.0
    if rope.kind == "longrope":
        assert rope.attention_factor is not None
        stretched = torch.tensor(rope.long_factor if long else rope.short_factor, dtype=torch.float32)
        return 1.0 / (stretched * wavelengths), rope.attention_factor
    if rope.kind == "llama3":
        return _llama3(rope, 1.0 / wavelengths), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, wavelengths, rotary_dim), _yarn_attention_factor(rope)
    return 1.0 / wavelengths, 1.0


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Short waves stay, long ones are stretched by `factor`, between them a linear blend in 1/wavelength.

    Source: Llama 3.1's model card code; a wave is long when fewer than low_freq_factor of it fit the original context.
    """
    context = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / frequencies
    share = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - share) * frequencies / rope.factor + share * frequencies
    stretched = torch.where(wavelength > context / rope.low_freq_factor, frequencies / rope.factor, blended)
    return torch.where(wavelength < context / rope.high_freq_factor, frequencies, stretched)


def _yarn(rope: RopeConfig, wavelengths: Tensor, rotary_dim: int) -> Tensor:
    """Blend of kept and stretched frequencies, linear in the dimension between beta_fast and beta_slow turns.

    Source: YaRN (Peng et al., 2023), "NTK-by-parts" interpolation.
    """

    def dimension(turns: float) -> float:
        """The (fractional) dimension whose wave turns this often over the original context."""
        length = rope.original_max_position_embeddings
        return rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    stretched = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return stretched / (rope.factor * wavelengths) + (1 - stretched) / wavelengths


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
