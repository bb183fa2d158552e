"""config.json of gpt-oss, as far as it goes beyond the decoder's tables: sinks, and experts with biases and a clamp."""

from __future__ import annotations

from dataclasses import replace

from nvfp4_runtime.config import Gate, ModelConfig
from nvfp4_runtime.models.config_values import Raw, number, unsupported

ARCHITECTURE = "GptOssForCausalLM"


def parse_experts(raw: Raw, model: ModelConfig) -> ModelConfig:
    """Raises UnsupportedFormatError naming field and value for what is not done here or cannot be."""
    if raw.get("attention_bias") not in (None, True):
        raise unsupported("attention_bias", raw["attention_bias"], "true or nothing for this architecture")
    limit, alpha = number(raw, "swiglu_limit", 7.0), number(raw, "swiglu_alpha", 1.702)
    if limit == 0:
        raise unsupported("swiglu_limit", raw["swiglu_limit"], "more than 0")
    assert model.moe is not None
    return replace(model, sinks=True, moe=replace(model.moe, gate=Gate("clamped", alpha, limit), biases=True))
