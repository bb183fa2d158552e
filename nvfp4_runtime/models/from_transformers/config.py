"""config.json of any decoder, as far as the engine has to know it, and transformers' own reading of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from nvfp4_runtime.config import Dtype, ModelConfig, RopeConfig
from nvfp4_runtime.models.config_values import Raw, count, flag, number, token_ids, unsupported
from nvfp4_runtime.models.from_transformers.attention import refused

# Arithmetic that transformers' module asks its mask or cache for, which stand empty here.
_NEEDS_MORE = {
    "attention_chunk_size": "attention within chunks",
    "num_kv_shared_layers": "layers that share their keys and values",
    "index_topk": "sparse attention that chooses its tokens",
}
# linear_attention: states in slots (states.py); mlp and moe: feed-forwards alone
_LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention", "mlp", "moe")


def generic_config(raw: Raw) -> ModelConfig:
    """The fields every decoder has; the rest is the module's own business. UnsupportedFormatError where one is none."""
    heads, hidden = count(raw, "num_attention_heads"), count(raw, "hidden_size")
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise unsupported("dtype", dtype, "bfloat16, float16 or float32")
    names = raw.get("architectures")
    return ModelConfig(
        architecture=str(names[0]) if isinstance(names, list) and names else "",
        model_type=str(raw.get("model_type", "")),
        hidden_size=hidden,
        intermediate_size=count(raw, "intermediate_size", hidden),
        num_layers=count(raw, "num_hidden_layers", _listed_layers(raw)),
        num_heads=heads,
        num_kv_heads=count(raw, "num_key_value_heads", heads),
        head_dim=count(raw, "head_dim", max(1, hidden // heads)),
        vocab_size=count(raw, "vocab_size"),
        max_position_embeddings=count(raw, "max_position_embeddings"),
        rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
        rope=RopeConfig(),
        tie_word_embeddings=flag(raw, "tie_word_embeddings"),
        dtype=cast(Dtype, dtype),
        bos_token_id=next(iter(token_ids(raw, "bos_token_id")), None),
        eos_token_ids=token_ids(raw, "eos_token_id"),
    )


def _listed_layers(raw: Raw) -> int | None:
    """The number of layers where config.json has a list of them and no number (Nemotron-H)."""
    listed = next((raw[f] for f in ("layers_block_type", "layer_types", "hybrid_override_pattern") if raw.get(f)), None)
    return len(listed) if isinstance(listed, list | str) else None


def transformers_config(raw: Raw) -> Any:
    """transformers' configuration object. No code of the checkpoint's folder is looked at, whatever `auto_map` says.

    Raises UnsupportedFormatError for types that transformers does not know and for what the paged cache cannot serve.
    """
    from transformers import CONFIG_MAPPING

    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise refused(f"its model_type {str(kind)[:80]!r} is none that transformers knows (remote code is never run)")
    plain = {k: v for k, v in raw.items() if k not in ("quantization_config", "auto_map", "torch_dtype", "dtype")}
    try:
        config = CONFIG_MAPPING[kind].from_dict(plain)
    except Exception as error:
        raise refused(f"transformers does not accept its config.json: {error}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise refused("it has an encoder")
    for field, what in _NEEDS_MORE.items():
        if getattr(config, field, None):
            raise refused(f"it has {what} ({field} is {getattr(config, field)})")
    types = getattr(config, "layer_types", None) or ()
    for other in {*types} - {*_LAYER_TYPES}:
        raise refused(f"its layers are of type {other!r}, whose states this fallback has no place for")
    return config


def layer_windows(config: Any, num_layers: int) -> Mapping[int, int | None]:
    """Layer to its sliding window where layer_types tells; layers it says nothing of are missing."""
    types = getattr(config, "layer_types", None) or ()
    window = getattr(config, "sliding_window", None)
    return {i: window if kind == "sliding_attention" else None for i, kind in enumerate(types[:num_layers])}
