"""config.json of Gemma 3's text model: what it leaves to the class, two rotary embeddings, a scale of the scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nvfp4_runtime.config import Gate, ModelConfig
from nvfp4_runtime.models.config_values import Raw, flag, number, unsupported
from nvfp4_runtime.models.hf_rope import parse_rope

ARCHITECTURE = "Gemma3ForCausalLM"
# What transformers' class fills in: published files leave much of it out.
_CLASS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def as_the_others(raw: Raw) -> dict[str, Any]:
    """The same values where the other decoders have theirs: one rotary embedding, that of the layers without window.

    Raises UnsupportedFormatError naming field and value for what is not done here.
    """
    act = raw.get("hidden_activation", raw.get("hidden_act"))
    if act not in (None, "gelu_pytorch_tanh"):
        raise unsupported("hidden_activation", act, "gelu_pytorch_tanh")
    if flag(raw, "use_bidirectional_attention"):
        raise unsupported("use_bidirectional_attention", True, "false: this server generates text")
    missing = {field: value for field, value in _CLASS.items() if raw.get(field) is None}
    local, everywhere = _ropes(raw)
    ropes = {"rope_parameters": everywhere, "rope_scaling": None, "local_rope_parameters": local}
    return {**raw, **missing, **ropes, "hidden_act": "silu"}  # the gate is set in parse_gemma3


def parse_gemma3(raw: Raw, model: ModelConfig) -> ModelConfig:
    """Raises UnsupportedFormatError naming field and value for what cannot be."""
    scalar = number(raw, "query_pre_attn_scalar", 256.0)
    if scalar == 0:
        raise unsupported("query_pre_attn_scalar", raw["query_pre_attn_scalar"], "more than 0")
    return replace(
        model,
        local_rope=parse_rope({"rope_parameters": raw["local_rope_parameters"]}, model.max_position_embeddings),
        attention_scale=scalar**-0.5,
        gate=Gate("gelu_tanh"),
        zero_centred=True,
    )


def _ropes(raw: Raw) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Of the layers with a window, and of the others; transformers 4 has the two bases in fields of their own."""
    both = raw.get("rope_parameters") or {}
    if not isinstance(both, Mapping) or not {*both} <= {_LOCAL, _GLOBAL}:
        raise unsupported("rope_parameters", both, f"a set of values for each of {_LOCAL} and {_GLOBAL}")
    for field, rope in (*both.items(), ("rope_scaling", raw.get("rope_scaling"))):
        if rope is not None and not isinstance(rope, Mapping):
            raise unsupported(field, rope, "a set of values, or null")
    local = {"rope_theta": number(raw, "rope_local_base_freq", 1e4), **(both.get(_LOCAL) or {})}
    scaling = both.get(_GLOBAL) or raw.get("rope_scaling") or {}
    return local, {"rope_theta": number(raw, "rope_theta", 1e6), **scaling}
