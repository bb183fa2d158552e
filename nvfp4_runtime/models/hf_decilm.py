"""config.json of DeciLM (Llama-3.3-Nemotron Super and Ultra): what each layer kept after the search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nvfp4_runtime.config import ModelConfig, NASLayer
from nvfp4_runtime.models.config_values import Raw, count, number, unsupported

ARCHITECTURE = "DeciLMForCausalLM"
_MULTIPLE = 256  # of which a feed-forward's width is one


def parse_nas_layers(raw: Raw, model: ModelConfig) -> ModelConfig:
    """`model`, read as a Llama, with its layers. Raises UnsupportedFormatError naming field and value."""
    blocks = raw.get("block_configs")
    if not isinstance(blocks, list) or len(blocks) != model.num_layers:
        raise unsupported("block_configs", blocks, f"a list of {model.num_layers} layers")
    layers = tuple(_layer(block, i, model) for i, block in enumerate(blocks))
    if not any(layer.num_kv_heads for layer in layers):
        raise unsupported("block_configs", "no attention anywhere", "at least one layer of attention")
    windows = tuple(layer.window for layer in layers)
    return replace(model, nas=layers, layer_windows=windows)


def _layer(block: Any, i: int, model: ModelConfig) -> NASLayer:
    attention, ffn = (_part(block, i, name) for name in ("attention", "ffn"))
    kv_heads, inner, window = 0, 0, None
    if not attention.get("no_op") and not attention.get("replace_with_linear"):
        group = count(attention, "n_heads_in_group")
        if model.num_heads % group:
            raise unsupported(
                f"block_configs[{i}].attention.n_heads_in_group", group, f"a divisor of {model.num_heads}"
            )
        kv_heads = model.num_heads // group
        window = None if attention.get("window_length") is None else count(attention, "window_length")
        for field in ("sparsify", "num_sink_tokens", "unshifted_sink"):
            if attention.get(field):
                raise unsupported(f"block_configs[{i}].attention.{field}", attention[field], "nothing")
    if not ffn.get("no_op") and not ffn.get("replace_with_linear"):
        inner = int(2 * number(ffn, "ffn_mult", 0.0) * model.hidden_size / 3)
        inner = -(-inner // _MULTIPLE) * _MULTIPLE
        if inner < 1:
            raise unsupported(f"block_configs[{i}].ffn.ffn_mult", ffn.get("ffn_mult"), "more than 0")
    return NASLayer(
        num_kv_heads=kv_heads,
        intermediate_size=inner,
        linear_attention=bool(attention.get("replace_with_linear")),
        linear_ffn=bool(ffn.get("replace_with_linear")),
        window=window,
    )


def _part(block: Any, i: int, name: str) -> dict[str, Any]:
    part = block.get(name) if isinstance(block, dict) else None
    if not isinstance(part, dict) or (part.get("no_op") and part.get("replace_with_linear")):
        raise unsupported(f"block_configs[{i}].{name}", part, "an object, no_op or replace_with_linear at most")
    return part
