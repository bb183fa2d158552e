"""config.json to ModelConfig: the spellings of transformers 4 and 5, and a refusal for what the decoder cannot do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from nvfp4_runtime.config import ModelConfig
from nvfp4_runtime.models import hf_decilm, hf_gemma3, hf_gemma4, hf_gpt_oss, hf_nemotron_h, hf_qwen3_next
from nvfp4_runtime.models.config_values import Raw, count, declared_dtype, flag, number, token_ids, unsupported
from nvfp4_runtime.models.hf_mla import LATENT, parse_mla
from nvfp4_runtime.models.hf_moe import ROUTERS, parse_moe
from nvfp4_runtime.models.hf_rope import parse_rope, rotary_dim_as_share


@dataclass(frozen=True)
class Family:
    """What an architecture's name says and its config.json does not.

    qkv_bias, o_bias  True, False, or the config field that decides
    qk_norm           True, False, or the config field that decides; "whole": all of a token's heads as one
    windows           "none"; "all" layers where sliding_window is set (Mistral); "layer_types" (Qwen); "unused": none,
                      and sliding_window means nothing unless use_sliding_window is set, which is refused; "pattern":
                      layer_types, or else all but every `full_every`th layer; "listed": layer_types, or else "all"
    window            when the config does not say: tokens, or None
    fused             q, k and v are one matrix in the files, gate and up another
    head_dim          when the config has none; None: hidden_size / num_attention_heads
    rotary_share      of a head's dimensions, when the config does not say; None: all of them, always
    """

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool | str = False
    windows: Literal["none", "all", "layer_types", "unused", "pattern", "listed"] = "none"
    full_every: int = 0
    window: int | None = 4096
    fused: bool = False
    head_dim: int | None = None
    rotary_share: float | None = None


FAMILIES = {
    "LlamaForCausalLM": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Family(windows="all"),
    "MinistralForCausalLM": Family(windows="listed"),
    "Ministral3ForCausalLM": Family(windows="all", window=None, head_dim=128),
    "Phi3ForCausalLM": Family(windows="all", window=None, rotary_share=1.0, fused=True),
    hf_gemma3.ARCHITECTURE: Family(
        qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, windows="pattern", full_every=6
    ),
    hf_gemma4.ARCHITECTURE: Family(
        qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, windows="pattern", window=512
    ),
    "Qwen2ForCausalLM": Family(qkv_bias=True, windows="layer_types"),
    "Qwen3ForCausalLM": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, windows="layer_types", head_dim=128
    ),
    "DeciLMForCausalLM": Family(),
    "MixtralForCausalLM": Family(windows="all"),
    "Qwen2MoeForCausalLM": Family(qkv_bias=True, windows="unused"),
    "Qwen3MoeForCausalLM": Family(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, windows="unused"),
    **dict.fromkeys(
        hf_qwen3_next.ARCHITECTURES,
        Family(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, head_dim=256, rotary_share=0.25),
    ),
    "MiniMaxM2ForCausalLM": Family(qk_norm="whole", head_dim=128, rotary_share=1.0),
    "DeepseekV3ForCausalLM": Family(),
    "Glm4MoeLiteForCausalLM": Family(),
    hf_gpt_oss.ARCHITECTURE: Family(
        qkv_bias=True, o_bias=True, windows="pattern", full_every=2, window=128, head_dim=64
    ),
    "Glm4MoeForCausalLM": Family(qkv_bias="attention_bias", qk_norm="use_qk_norm", rotary_share=0.5),
}

# Features of relatives that change the arithmetic: absent, None, or this value.
_NEUTRAL: dict[str, Any] = {
    "attention_chunk_size": None,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "embedding_multiplier": 1.0,
    "final_logit_softcapping": None,
    "logits_scaling": 1.0,
    "no_rope_layers": None,
    "qkv_bias": True,
    "residual_multiplier": 1.0,
    "use_mrope": False,
}


# Those whose config.json says it otherwise than the table above expects, or says more than it can hold.
_FIRST: dict[str, Callable[[Raw], Raw]] = {
    "MiniMaxM2ForCausalLM": rotary_dim_as_share,
    hf_gemma3.ARCHITECTURE: hf_gemma3.as_the_others,
    hf_gemma4.ARCHITECTURE: hf_gemma4.as_the_others,
    **dict.fromkeys(hf_qwen3_next.ARCHITECTURES, hf_qwen3_next.as_the_others),
}
_FURTHER: dict[str, Callable[[Raw, ModelConfig], ModelConfig]] = {
    **dict.fromkeys(hf_qwen3_next.ARCHITECTURES, hf_qwen3_next.parse_delta),
    hf_decilm.ARCHITECTURE: hf_decilm.parse_nas_layers,
    hf_gemma3.ARCHITECTURE: hf_gemma3.parse_gemma3,
    hf_gemma4.ARCHITECTURE: hf_gemma4.parse_gemma4,
    hf_gpt_oss.ARCHITECTURE: hf_gpt_oss.parse_experts,
}


def parse_model_config(raw: Raw) -> ModelConfig:
    """What the decoder needs to know of a config.json.

    Raises UnsupportedFormatError naming field and value for an unknown architecture, activation, rope type or window
    layout, and for values that cannot be.
    """
    architecture = parse_architecture(raw)
    if architecture == hf_nemotron_h.ARCHITECTURE:
        return hf_nemotron_h.parse_nemotron_h(raw)
    if architecture not in FAMILIES:
        raise unsupported("architectures", architecture, f"one of {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[architecture]
    if (first := _FIRST.get(architecture)) is not None:
        raw = first(raw)
    _refuse_other_arithmetic(raw)
    num_layers, num_heads = count(raw, "num_hidden_layers"), count(raw, "num_attention_heads")
    # DeciLM's config.json has null there: each layer has a number of its own
    num_kv_heads = count(raw, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise unsupported("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    hidden_size = count(raw, "hidden_size")
    head_dim = count(raw, "head_dim", family.head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise unsupported("head_dim", head_dim, "an even number, since rope turns pairs")
    max_position = count(raw, "max_position_embeddings")
    rope = parse_rope(raw, max_position, family.rotary_share)
    if int(head_dim * rope.partial_rotary_factor) % 2:
        raise unsupported("partial_rotary_factor", rope.partial_rotary_factor, f"an even share of head_dim {head_dim}")
    for name, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
        if rope.kind == "longrope" and 2 * len(factors) != int(head_dim * rope.partial_rotary_factor):
            wanted = int(head_dim * rope.partial_rotary_factor) // 2
            raise unsupported(
                f"rope_parameters.{name}", list(factors), f"{wanted} numbers, one for each pair that turns"
            )
    model = ModelConfig(
        architecture=architecture,
        vision_class=str(raw.get("vision_class", "")),
        model_type=str(raw.get("model_type", "")),
        hidden_size=hidden_size,
        intermediate_size=count(raw, "intermediate_size", 1 if architecture == hf_decilm.ARCHITECTURE else None),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=count(raw, "vocab_size"),
        max_position_embeddings=max_position,
        rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
        rope=rope,
        tie_word_embeddings=flag(raw, "tie_word_embeddings"),
        qkv_bias=_family_flag(raw, family.qkv_bias),
        o_bias=_family_flag(raw, family.o_bias),
        mlp_bias=_family_flag(raw, family.mlp_bias),
        qk_norm=family.qk_norm != "whole" and _family_flag(raw, family.qk_norm),
        whole_qk_norm=family.qk_norm == "whole",
        fused=family.fused,
        layer_windows=_windows(raw, family, num_layers),
        dtype=declared_dtype(raw),
        bos_token_id=next(iter(token_ids(raw, "bos_token_id")), None),
        eos_token_ids=token_ids(raw, "eos_token_id"),
        moe=parse_moe(raw, ROUTERS[architecture], num_layers) if architecture in ROUTERS else None,
        mla=parse_mla(raw, rope) if architecture in LATENT else None,
        num_draft_layers=count(raw, "num_nextn_predict_layers") if raw.get("num_nextn_predict_layers") else 0,
    )
    finish = _FURTHER.get(architecture)
    return model if finish is None else finish(raw, model)


def parse_architecture(raw: Raw) -> str:
    """The one name in `architectures`."""
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise unsupported("architectures", names, "a list of one class name")
    return str(names[0])


def _windows(raw: Raw, family: Family, num_layers: int) -> tuple[int | None, ...]:
    size = raw.get("sliding_window", family.window if family.windows != "none" else None)
    if family.windows == "unused":
        if flag(raw, "use_sliding_window"):
            raise unsupported("use_sliding_window", True, "false for this architecture")
        size = None
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size <= 0):
        raise unsupported("sliding_window", size, "a positive number of tokens, or null")
    types = raw.get("layer_types")
    if types is not None and (not isinstance(types, list) or len(types) != num_layers):
        raise unsupported("layer_types", types, f"a list of {num_layers} names")
    for kind in types or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise unsupported("layer_types", kind, "full_attention or sliding_attention")
    if family.windows in ("pattern", "listed") and (types is not None or family.windows == "pattern"):
        if types is None:
            every = count(raw, "sliding_window_pattern", family.full_every)
            types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(num_layers)]
        if size is None and "sliding_attention" in types:
            raise unsupported("sliding_window", None, "a number of tokens, since layer_types has some")
        return tuple(size if kind == "sliding_attention" else None for kind in types)
    if family.windows == "layer_types":
        size = size if flag(raw, "use_sliding_window") else None
        if types is None:
            first = raw.get("max_window_layers", 28)  # the class's default in transformers
            if type(first) is not int or first < 0:
                raise unsupported("max_window_layers", first, "a count of layers, 0 or more")
            types = ["full_attention" if size is None or i < first else "sliding_attention" for i in range(num_layers)]
        if size is None and "sliding_attention" in types:
            raise unsupported("use_sliding_window", False, "true and a sliding_window, since layer_types has some")
        return tuple(size if kind == "sliding_attention" else None for kind in types)
    expected = "sliding_attention" if family.windows in ("all", "listed") and size is not None else "full_attention"
    if types is not None and any(kind != expected for kind in types):
        raise unsupported("layer_types", types, f"{expected} everywhere for this architecture")
    if family.windows == "none" and size is not None:
        raise unsupported("sliding_window", size, "null for this architecture")
    return (size,) * num_layers


def _refuse_other_arithmetic(raw: Raw) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise unsupported("hidden_act", activation, "silu")
    for field, neutral in _NEUTRAL.items():
        value = raw.get(field)
        if value is not None and value != neutral:
            raise unsupported(field, value, f"{neutral} or nothing")


def _family_flag(raw: Raw, rule: bool | str) -> bool:
    return flag(raw, rule) if isinstance(rule, str) else rule
