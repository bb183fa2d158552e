"""config.json of Gemma 4's text model: heads by kind of layer, two rotary embeddings, experts beside a feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nvfp4_runtime.config import Gate, Gemma4Layer, ModelConfig, MoEConfig, RopeConfig
from nvfp4_runtime.models.config_values import Raw, count, flag, number, unsupported
from nvfp4_runtime.models.hf_rope import parse_rope

ARCHITECTURE = "Gemma4ForCausalLM"
# What transformers' class fills in.
_CLASS = {
    "vocab_size": 262_144,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_LOCAL_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_GLOBAL_ROPE = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
# What the smallest models have, and what is done with it.
_NOT_HERE = {
    "num_kv_shared_layers": (0, "0: layers that share keys and values are not done here"),
    "hidden_size_per_layer_input": (256, "0: embeddings for each layer are not done here"),
}


def as_the_others(raw: Raw) -> dict[str, Any]:
    """The same values where the other decoders have theirs: one rotary embedding, that of the layers with a window.

    Raises UnsupportedFormatError naming field and value for what is not done here.
    """
    for field, (of_class, expected) in _NOT_HERE.items():
        if (value := raw.get(field, of_class)) not in (0, None):
            raise unsupported(field, value, expected)
    if raw.get("use_bidirectional_attention") not in (None, False, "vision"):
        raise unsupported("use_bidirectional_attention", raw["use_bidirectional_attention"], "none for text")
    act = raw.get("hidden_activation", "gelu_pytorch_tanh")
    if act != "gelu_pytorch_tanh":
        raise unsupported("hidden_activation", act, "gelu_pytorch_tanh")
    both = raw.get("rope_parameters") or {}
    if not isinstance(both, Mapping) or not all(isinstance(both.get(k) or {}, Mapping) for k in (_LOCAL, _GLOBAL)):
        raise unsupported("rope_parameters", both, f"a set of values for each of {_LOCAL} and {_GLOBAL}")
    missing = {field: value for field, value in _CLASS.items() if raw.get(field) is None}
    own = {"final_logit_softcapping": None, "softcap": raw.get("final_logit_softcapping"), "layer_types": _types(raw)}
    ropes = {"rope_parameters": both.get(_LOCAL) or _LOCAL_ROPE, "global_rope": both.get(_GLOBAL) or _GLOBAL_ROPE}
    return {**raw, **missing, **own, **ropes, "hidden_act": "silu"}  # the gate is set in parse_gemma4


def parse_gemma4(raw: Raw, model: ModelConfig) -> ModelConfig:
    """Raises UnsupportedFormatError naming field and value for what cannot be."""
    layers = tuple(_layer(raw, model, i) for i in range(model.num_layers))
    return replace(
        model,
        local_rope=model.rope,
        rope=_global_rope(raw["global_rope"], model.max_position_embeddings),
        attention_scale=1.0,
        gate=Gate("gelu_tanh"),
        gemma4=layers,
        final_softcap=number(raw, "softcap", 0.0),
        moe=_experts(raw, model.num_layers) if flag(raw, "enable_moe_block") else None,
    )


def _types(raw: Raw) -> list[str]:
    """The last layer has no window, whatever the file says: so does transformers."""
    num_layers, types = count(raw, "num_hidden_layers"), raw.get("layer_types")
    if types is None:
        types = [_LOCAL if (i + 1) % 6 else _GLOBAL for i in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in (_LOCAL, _GLOBAL) for kind in types):
        raise unsupported("layer_types", types, f"a list of {num_layers} times {_LOCAL} or {_GLOBAL}")
    return [*types[:-1], _GLOBAL]


def _layer(raw: Raw, model: ModelConfig, layer_id: int) -> Gemma4Layer:
    if model.layer_windows[layer_id] is not None:
        return Gemma4Layer(model.num_kv_heads, model.head_dim, windowed=True, key_is_value=False)
    shared = flag(raw, "attention_k_eq_v")
    own = raw.get("per_layer_config")
    values = own.get(str(layer_id), own.get(layer_id)) if isinstance(own, Mapping) else None
    if values is None:  # as published: two fields for all layers without a window
        values = {"head_dim": raw.get("global_head_dim", 512)}
        if shared and raw.get("num_global_key_value_heads") is not None:
            values["num_key_value_heads"] = raw["num_global_key_value_heads"]
    if not isinstance(values, Mapping):
        raise unsupported("per_layer_config", values, "a set of values for each layer named")
    heads, dim = count(values, "num_key_value_heads", model.num_kv_heads), count(values, "head_dim", model.head_dim)
    if model.num_heads % heads:
        raise unsupported("num_global_key_value_heads", heads, f"a divisor of num_attention_heads ({model.num_heads})")
    if dim % 2:
        raise unsupported("global_head_dim", dim, "an even number, since rope turns pairs")
    return Gemma4Layer(heads, dim, windowed=False, key_is_value=shared)


def _global_rope(rope: Mapping[str, Any], max_position: int) -> RopeConfig:
    if rope.get("rope_type") != "proportional":
        return parse_rope({"rope_parameters": rope}, max_position)
    share = number(rope, "partial_rotary_factor", 1.0)
    theta, factor = number(rope, "rope_theta", 1e6), number(rope, "factor", 1.0)
    if not 0 < share <= 1 or theta <= 1 or factor == 0:
        raise unsupported(
            "rope_parameters.full_attention", dict(rope), "a share up to 1, a base above 1, a factor above 0"
        )
    return RopeConfig(theta=theta, kind="proportional", factor=factor, partial_rotary_factor=share)


def _experts(raw: Raw, num_layers: int) -> MoEConfig:
    experts, top_k = count(raw, "num_experts"), count(raw, "top_k_experts")
    if top_k > experts:
        raise unsupported("top_k_experts", top_k, f"at most num_experts ({experts})")
    size = count(raw, "moe_intermediate_size")
    return MoEConfig(experts, top_k, size, layers=(True,) * num_layers, gate=Gate("gelu_tanh"))
