"""config.json of Qwen3-Next and Qwen3.5: which layers are gated delta nets, and their sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nvfp4_runtime.config import DeltaConfig, ModelConfig
from nvfp4_runtime.models.config_values import Raw, count, unsupported

NEXT = "Qwen3NextForCausalLM"
ARCHITECTURES = (NEXT, "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")
_LINEAR, _FULL = "linear_attention", "full_attention"


def as_the_others(raw: Raw) -> dict[str, Any]:
    """The same without what the tables of the other decoders do not know: kinds of layers, and how rope would share
    its dimensions among the axes of an image, which text does not have."""
    rope = raw.get("rope_parameters")
    if isinstance(rope, dict):
        rope = {name: value for name, value in rope.items() if name not in ("mrope_section", "mrope_interleaved")}
    return {**raw, "layer_types": None, "rope_parameters": rope, "delta_layers": _layers(raw)}


def parse_delta(raw: Raw, model: ModelConfig) -> ModelConfig:
    """Raises UnsupportedFormatError naming field and value for what cannot be."""
    keys, values = count(raw, "linear_num_key_heads", 16), count(raw, "linear_num_value_heads", 32)
    if values % keys:
        raise unsupported("linear_num_value_heads", values, f"a multiple of linear_num_key_heads ({keys})")
    width = count(raw, "linear_conv_kernel_dim", 4)
    if not 2 <= width <= 16:
        raise unsupported("linear_conv_kernel_dim", width, "2 to 16")
    delta = DeltaConfig(
        num_key_heads=keys,
        num_value_heads=values,
        key_dim=count(raw, "linear_key_head_dim", 128),
        value_dim=count(raw, "linear_value_head_dim", 128),
        conv_width=width,
        layers=tuple(raw["delta_layers"]),
        joined=model.architecture == NEXT,
    )
    return replace(model, delta=delta, zero_centred=True)


def _layers(raw: Raw) -> list[bool]:
    num_layers, types = count(raw, "num_hidden_layers"), raw.get("layer_types")
    if types is None:
        every = count(raw, "full_attention_interval", 4)
        types = [_LINEAR if (i + 1) % every else _FULL for i in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in (_LINEAR, _FULL) for kind in types):
        raise unsupported("layer_types", types, f"a list of {num_layers} times {_LINEAR} or {_FULL}")
    if _FULL not in types:
        raise unsupported("layer_types", types, f"at least one {_FULL}")
    return [kind == _LINEAR for kind in types]
