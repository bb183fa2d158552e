"""config.json to ModelConfig: the spellings of transformers 4 and 5, and a refusal for what the decoder cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from nvfp4_runtime.config import Dtype, ModelConfig, RopeConfig
from nvfp4_runtime.errors import UnsupportedFormatError

Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What an architecture's name says and its config.json does not.

    qkv_bias, o_bias  True, False, or the config field that decides
    windows           "none"; "all" layers where sliding_window is set (Mistral); "layer_types" (Qwen)
    head_dim          when the config has none; None: hidden_size / num_attention_heads
    """

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: Literal["none", "all", "layer_types"] = "none"
    head_dim: int | None = None


FAMILIES = {
    "LlamaForCausalLM": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Family(windows="all"),
    "Qwen2ForCausalLM": Family(qkv_bias=True, windows="layer_types"),
    "Qwen3ForCausalLM": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, windows="layer_types", head_dim=128
    ),
}

_CLASS_WINDOW = 4096  # transformers' default where a Mistral or Qwen config.json lacks sliding_window (null: none)

# Beyond any model there is, and small enough that nothing sized by them alone exhausts the memory: a config.json may
# claim anything, and its tensors are looked at later.
_LIMITS = {"num_hidden_layers": 10_000, "num_attention_heads": 65_536, "head_dim": 8_192}
_LIMIT = 2**31 - 1

# Features of relatives that change the arithmetic: absent, None, or this value.
_NEUTRAL: dict[str, Any] = {
    "attention_chunk_size": None,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "embedding_multiplier": 1.0,
    "final_logit_softcapping": None,
    "logits_scaling": 1.0,
    "no_rope_layers": None,
    "partial_rotary_factor": 1.0,
    "residual_multiplier": 1.0,
    "use_mrope": False,
}


def parse_model_config(raw: Raw) -> ModelConfig:
    """What the decoder needs to know of a config.json.

    Raises UnsupportedFormatError naming field and value for an unknown architecture, activation, rope type or window
    layout, and for values that cannot be.
    """
    architecture = parse_architecture(raw)
    if architecture not in FAMILIES:
        raise _unsupported("architectures", architecture, f"one of {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[architecture]
    _refuse_other_arithmetic(raw)
    num_layers, num_heads = _count(raw, "num_hidden_layers"), _count(raw, "num_attention_heads")
    num_kv_heads = _count(raw, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise _unsupported("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    hidden_size = _count(raw, "hidden_size")
    head_dim = _count(raw, "head_dim", family.head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise _unsupported("head_dim", head_dim, "an even number, since rope turns pairs")
    max_position = _count(raw, "max_position_embeddings")
    return ModelConfig(
        architecture=architecture,
        model_type=str(raw.get("model_type", "")),
        hidden_size=hidden_size,
        intermediate_size=_count(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_count(raw, "vocab_size"),
        max_position_embeddings=max_position,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=parse_rope(raw, max_position),
        tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
        qkv_bias=_family_flag(raw, family.qkv_bias),
        o_bias=_family_flag(raw, family.o_bias),
        mlp_bias=_family_flag(raw, family.mlp_bias),
        qk_norm=family.qk_norm,
        layer_windows=_windows(raw, family, num_layers),
        dtype=_dtype(raw),
        bos_token_id=next(iter(_token_ids(raw, "bos_token_id")), None),
        eos_token_ids=_token_ids(raw, "eos_token_id"),
    )


def parse_architecture(raw: Raw) -> str:
    """The one name in `architectures`."""
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise _unsupported("architectures", names, "a list of one class name")
    return str(names[0])


def parse_rope(raw: Raw, max_position: int) -> RopeConfig:
    """`rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (transformers 4)."""
    field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(field) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise _unsupported(field, rope, "one set of values for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise _unsupported(f"{field}.rope_type", kind, "default, linear, llama3 or yarn")
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise _unsupported(f"{field}.partial_rotary_factor", partial, "1.0")
    if rope.get("mrope_section") is not None:
        raise _unsupported(f"{field}.mrope_section", rope["mrope_section"], "no multimodal rope")
    place = rope if rope.get("rope_theta") else raw
    theta = _number(place, "rope_theta", 10000.0)
    if theta <= 1:
        raise _unsupported("rope_theta", theta, "more than 1")
    if kind == "default":
        return RopeConfig(theta=theta)
    # a few models keep the original length beside the rope fields; there it takes precedence
    original = (
        raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or max_position
    )
    if isinstance(original, bool) or not isinstance(original, int | float) or not 1 <= original <= _LIMIT:
        raise _unsupported(f"{field}.original_max_position_embeddings", original, "a positive number of tokens")
    factor = rope.get("factor")
    if factor is None and kind == "yarn":
        factor = max_position / original
    numbers: dict[str, Any] = {"factor": factor}
    if kind == "llama3":
        numbers |= {name: rope.get(name) for name in ("low_freq_factor", "high_freq_factor")}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LIMIT:
            raise _unsupported(f"{field}.{name}", value, f"a positive number, as rope type {kind} needs")
        numbers[name] = float(value)
    if kind == "llama3" and numbers["low_freq_factor"] == numbers["high_freq_factor"]:
        raise _unsupported(f"{field}.high_freq_factor", numbers["high_freq_factor"], "more than low_freq_factor")
    return RopeConfig(
        theta=theta,
        kind=cast(Literal["linear", "llama3", "yarn"], kind),
        original_max_position_embeddings=int(original),
        beta_fast=_number(rope, "beta_fast", 32.0) or 32.0,
        beta_slow=_number(rope, "beta_slow", 1.0) or 1.0,
        attention_factor=_optional(rope, "attention_factor"),
        mscale=_optional(rope, "mscale"),
        mscale_all_dim=_optional(rope, "mscale_all_dim"),
        truncate=bool(rope.get("truncate", True)),
        **numbers,
    )


def _windows(raw: Raw, family: Family, num_layers: int) -> tuple[int | None, ...]:
    size = raw.get("sliding_window", _CLASS_WINDOW if family.windows != "none" else None)
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size <= 0):
        raise _unsupported("sliding_window", size, "a positive number of tokens, or null")
    types = raw.get("layer_types")
    if types is not None and (not isinstance(types, list) or len(types) != num_layers):
        raise _unsupported("layer_types", types, f"a list of {num_layers} names")
    for kind in types or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise _unsupported("layer_types", kind, "full_attention or sliding_attention")
    if family.windows == "layer_types":
        size = size if _flag(raw, "use_sliding_window") else None
        if types is None:
            first = raw.get("max_window_layers", 28)  # the class's default in transformers
            if type(first) is not int or first < 0:
                raise _unsupported("max_window_layers", first, "a count of layers, 0 or more")
            types = ["full_attention" if size is None or i < first else "sliding_attention" for i in range(num_layers)]
        if size is None and "sliding_attention" in types:
            raise _unsupported("use_sliding_window", False, "true and a sliding_window, since layer_types has some")
        return tuple(size if kind == "sliding_attention" else None for kind in types)
    expected = "sliding_attention" if family.windows == "all" and size is not None else "full_attention"
    if types is not None and any(kind != expected for kind in types):
        raise _unsupported("layer_types", types, f"{expected} everywhere for this architecture")
    if family.windows == "none" and size is not None:
        raise _unsupported("sliding_window", size, "null for this architecture")
    return (size,) * num_layers


def _refuse_other_arithmetic(raw: Raw) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise _unsupported("hidden_act", activation, "silu")
    for field, neutral in _NEUTRAL.items():
        value = raw.get(field)
        if value is not None and value != neutral:
            raise _unsupported(field, value, f"{neutral} or nothing")


def _dtype(raw: Raw) -> Dtype:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in ("bfloat16", "float16", "float32"):
        raise _unsupported("dtype", name, "bfloat16, float16 or float32")
    return cast(Dtype, name)


def _count(raw: Raw, field: str, default: int | None = None) -> int:
    value = raw.get(field)
    value = default if value is None else value
    limit = _LIMITS.get(field, _LIMIT)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
        raise _unsupported(field, value, f"a positive integer, at most {limit}")
    return value


def _number(raw: Raw, field: str, default: float) -> float:
    value = raw.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LIMIT:  # NaN is neither
        raise _unsupported(field, value, f"a number from 0 to {_LIMIT}")
    return float(value)


def _optional(raw: Raw, field: str) -> float | None:
    return None if raw.get(field) is None else _number(raw, field, 0.0)


def _token_ids(raw: Raw, field: str) -> tuple[int, ...]:
    """One id, several, or none."""
    value = raw.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i <= _LIMIT for i in ids):
        raise _unsupported(field, value, "a token id, a list of them, or null")
    return tuple(ids)


def _flag(raw: Raw, field: str) -> bool:
    value = raw.get(field)
    if value is not None and not isinstance(value, bool):
        raise _unsupported(field, value, "true or false")
    return bool(value)


def _family_flag(raw: Raw, rule: bool | str) -> bool:
    return _flag(raw, rule) if isinstance(rule, str) else rule


def _unsupported(field: str, found: object, expected: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(f"config.json: {field} is {_shown(found)}; expected {expected}")


def _shown(found: object) -> str:
    """A value for a message: a stranger's number may have more digits than Python cares to print."""
    if isinstance(found, int) and found.bit_length() > 128:
        return f"a number of {found.bit_length()} bits"
    text = repr(found)
    return text if len(text) <= 100 else f"{text[:100]}..."
