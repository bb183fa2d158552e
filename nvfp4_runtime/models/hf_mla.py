"""The latent attention that a config.json asks for."""

from __future__ import annotations

import math

from nvfp4_runtime.config import MLAConfig, RopeConfig
from nvfp4_runtime.models.config_values import Raw, count, flag, unsupported

LATENT = ("DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM")


def parse_mla(raw: Raw, rope: RopeConfig) -> MLAConfig:
    """Raises UnsupportedFormatError for values that cannot be, and for biases, which no known checkpoint has."""
    if flag(raw, "attention_bias"):
        raise unsupported("attention_bias", True, "false for this architecture")
    nope, turned = count(raw, "qk_nope_head_dim"), count(raw, "qk_rope_head_dim")
    if turned % 2:
        raise unsupported("qk_rope_head_dim", turned, "an even number, since rope turns pairs")
    return MLAConfig(
        q_lora_rank=None if raw.get("q_lora_rank") is None else count(raw, "q_lora_rank"),
        kv_lora_rank=count(raw, "kv_lora_rank"),
        nope_dim=nope,
        rope_dim=turned,
        v_dim=count(raw, "v_head_dim"),
        interleaved=raw.get("rope_interleave") is None or flag(raw, "rope_interleave"),
        scale=(nope + turned) ** -0.5 * _correction(rope) ** 2,
    )


def _correction(rope: RopeConfig) -> float:
    """YaRN's factor on queries and on keys where mscale_all_dim asks for it. Source: DeepSeek-V3's model code."""
    if rope.kind != "yarn" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0
