"""The modules that each architecture reads, with their shapes: what `nvfp4 inspect` holds a checkpoint against.

Written beside models/llama.py, which does the reading; a test loads one model of each family and compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvfp4_runtime.checkpoint.doctor.expected import Expected, Module
from nvfp4_runtime.config import ModelConfig
from nvfp4_runtime.models import ARCHITECTURES, HARMLESS
from nvfp4_runtime.models.hf_config import parse_model_config


def expected(config: Mapping[str, Any]) -> Expected | None:
    """What the model of this config.json reads; None for an architecture that has no model here.

    Raises UnsupportedFormatError as `parse_model_config` does.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or str(names[0]) not in ARCHITECTURES:
        return None
    model = parse_model_config(config)
    table = {"model.embed_tokens": Module((model.vocab_size, model.hidden_size), linear=False)}
    for i in range(model.num_layers):
        table |= {f"model.layers.{i}.{name}": module for name, module in _layer(model).items()}
    table["model.norm"] = _vector(model.hidden_size)
    table["lm_head"] = Module((model.vocab_size, model.hidden_size), optional=model.tie_word_embeddings)
    return Expected(model.architecture, table, tuple(HARMLESS))


def _layer(model: ModelConfig) -> dict[str, Module]:
    hidden, inner, dim = model.hidden_size, model.intermediate_size, model.head_dim
    queries, keys = model.num_heads * dim, model.num_kv_heads * dim
    table = {
        "input_layernorm": _vector(hidden),
        "self_attn.q_proj": Module((queries, hidden), bias=model.qkv_bias),
        "self_attn.k_proj": Module((keys, hidden), bias=model.qkv_bias),
        "self_attn.v_proj": Module((keys, hidden), bias=model.qkv_bias),
        "self_attn.o_proj": Module((hidden, queries), bias=model.o_bias),
        "post_attention_layernorm": _vector(hidden),
        "mlp.gate_proj": Module((inner, hidden), bias=model.mlp_bias),
        "mlp.up_proj": Module((inner, hidden), bias=model.mlp_bias),
        "mlp.down_proj": Module((hidden, inner), bias=model.mlp_bias),
    }
    if model.qk_norm:
        table |= {f"self_attn.{name}": _vector(dim) for name in ("q_norm", "k_norm")}
    return table


def _vector(size: int) -> Module:
    return Module((size,), linear=False)
