"""The modules that each architecture reads, with their shapes: what `nvfp4 inspect` holds a checkpoint against.

Written beside models/llama.py, which does the reading; a test loads one model of each family and compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvfp4_runtime.checkpoint.doctor.expected import Expected, Mixture, Module
from nvfp4_runtime.config import MLAConfig, ModelConfig, MoEConfig
from nvfp4_runtime.models import ARCHITECTURES, harmless
from nvfp4_runtime.models.hf_config import parse_model_config

_SPARSE_BLOCK = ("MixtralForCausalLM", "MiniMaxM2ForCausalLM")


def expected(config: Mapping[str, Any]) -> Expected | None:
    """What the model of this config.json reads; None for an architecture that has no model here, or one whose
    model is in another file than models/llama.py: its layers are held against each other.

    Raises UnsupportedFormatError as `parse_model_config` does.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or str(names[0]) not in ARCHITECTURES:
        return None
    if ARCHITECTURES[str(names[0])] != "llama":
        return None
    model = parse_model_config(config)
    table = {"model.embed_tokens": Module((model.vocab_size, model.hidden_size), linear=False)}
    loose, mixtures = {}, {}
    for i in range(model.num_layers):
        prefix = f"model.layers.{i}"
        table |= {f"{prefix}.{name}": module for name, module in _attention(model).items()}
        if model.moe is not None and model.moe.layers[i]:
            block = f"{prefix}.block_sparse_moe" if model.architecture in _SPARSE_BLOCK else f"{prefix}.mlp"
            table |= {f"{block}.{name}": module for name, module in _mixture(model.moe, model.hidden_size).items()}
            if model.moe.correction_bias:
                router = block if model.whole_qk_norm else f"{block}.gate"  # MiniMax's lies beside the router
                loose[f"{router}.e_score_correction_bias"] = (model.moe.num_experts,)
            mixtures[f"{block}.experts"] = Mixture(
                model.moe.num_experts, model.hidden_size, model.moe.intermediate_size
            )
        else:
            feed_forward = _feed_forward(model.hidden_size, model.intermediate_size, model.mlp_bias, model.fused)
            table |= {f"{prefix}.mlp.{name}": module for name, module in feed_forward.items()}
    table["model.norm"] = _vector(model.hidden_size)
    table["lm_head"] = Module((model.vocab_size, model.hidden_size), optional=model.tie_word_embeddings)
    return Expected(model.architecture, table, tuple(harmless(model)), loose, mixtures)


def _attention(model: ModelConfig) -> dict[str, Module]:
    if model.mla is not None:
        return _latent_attention(model, model.mla)
    hidden, dim = model.hidden_size, model.head_dim
    queries, keys = model.num_heads * dim, model.num_kv_heads * dim
    sizes = {"qkv": queries + 2 * keys} if model.fused else {"q": queries, "k": keys, "v": keys}
    table = {
        "input_layernorm": _vector(hidden),
        **{f"self_attn.{name}_proj": Module((n, hidden), bias=model.qkv_bias) for name, n in sizes.items()},
        "self_attn.o_proj": Module((hidden, queries), bias=model.o_bias),
        "post_attention_layernorm": _vector(hidden),
    }
    if model.whole_qk_norm:
        table |= {"self_attn.q_norm": _vector(queries), "self_attn.k_norm": _vector(keys)}
    if model.qk_norm:
        table |= {f"self_attn.{name}": _vector(dim) for name in ("q_norm", "k_norm")}
    return table


def _latent_attention(model: ModelConfig, mla: MLAConfig) -> dict[str, Module]:
    hidden, heads, rank = model.hidden_size, model.num_heads, mla.kv_lora_rank
    queries = heads * (mla.nope_dim + mla.rope_dim)
    table = {
        "input_layernorm": _vector(hidden),
        "self_attn.kv_a_proj_with_mqa": Module((rank + mla.rope_dim, hidden)),
        "self_attn.kv_a_layernorm": _vector(rank),
        "self_attn.kv_b_proj": Module((heads * (mla.nope_dim + mla.v_dim), rank)),
        "self_attn.o_proj": Module((hidden, heads * mla.v_dim)),
        "post_attention_layernorm": _vector(hidden),
    }
    if mla.q_lora_rank is None:
        return table | {"self_attn.q_proj": Module((queries, hidden))}
    return table | {
        "self_attn.q_a_proj": Module((mla.q_lora_rank, hidden)),
        "self_attn.q_a_layernorm": _vector(mla.q_lora_rank),
        "self_attn.q_b_proj": Module((queries, mla.q_lora_rank)),
    }


def _feed_forward(hidden: int, inner: int, bias: bool = False, fused: bool = False) -> dict[str, Module]:
    gate, down = Module((inner, hidden), bias=bias), Module((hidden, inner), bias=bias)
    if fused:
        return {"gate_up_proj": Module((2 * inner, hidden), bias=bias), "down_proj": down}
    return {"gate_proj": gate, "up_proj": gate, "down_proj": down}


def _mixture(moe: MoEConfig, hidden: int) -> dict[str, Module]:
    """All but the experts."""
    table = {"gate": Module((moe.num_experts, hidden))}
    if moe.shared_size:
        name = "shared_expert" if moe.shared_gate else "shared_experts"
        table |= {f"{name}.{part}": module for part, module in _feed_forward(hidden, moe.shared_size).items()}
    if moe.shared_gate:
        table["shared_expert_gate"] = Module((1, hidden))
    return table


def _vector(size: int) -> Module:
    return Module((size,), linear=False)
