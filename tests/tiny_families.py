"""Small models of the families whose layers need tables of their own; names as the hub's files have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]
Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


def base_config(architecture: str, model_type: str) -> Config:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "dtype": "float32",
    }


def gpt_oss_config(**overrides: Any) -> Config:
    """gpt-oss: sinks, a window in the first layer, experts in stacks of [in, out] with biases."""
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "swiglu_limit": 7.0, "hidden_act": "silu"}
    rope = {"rope_parameters": {**_YARN, "truncate": False}}
    config = {**base_config("GptOssForCausalLM", "gpt_oss"), **experts, **rope, "attention_bias": True}
    return {**config, "sliding_window": 16, "pad_token_id": 257, **overrides}


def _attention(config: Config, bias: bool) -> Shapes:
    hidden, dim = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    sizes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    shapes: Shapes = {}
    for name, size in sizes.items():
        shapes[f"self_attn.{name}.weight"] = size
        if bias:
            shapes[f"self_attn.{name}.bias"] = size[:1]
    return shapes


def _norms(config: Config, *names: str) -> Shapes:
    return {f"{name}.weight": (config["hidden_size"],) for name in names}


def _gpt_oss_layer(config: Config, _: int) -> Shapes:
    hidden, inner, count = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    return {
        **_attention(config, bias=True),
        "self_attn.sinks": (config["num_attention_heads"],),
        **_norms(config, "input_layernorm", "post_attention_layernorm"),
        "mlp.router.weight": (count, hidden),
        "mlp.router.bias": (count,),
        "mlp.experts.gate_up_proj": (count, hidden, 2 * inner),
        "mlp.experts.gate_up_proj_bias": (count, 2 * inner),
        "mlp.experts.down_proj": (count, inner, hidden),
        "mlp.experts.down_proj_bias": (count, hidden),
    }


LAYERS: Mapping[str, Callable[[Config, int], Shapes]] = {"gpt_oss": _gpt_oss_layer}
ZERO_CENTRED: tuple[str, ...] = ()  # model types whose norms are stored less 1


def random_tensors(config: Config, seed: int, dtype: torch.dtype) -> Tensors:
    """Norms near 1 (as stored), biases and other vectors small, matrices of norm 1 per row."""
    generator = torch.Generator().manual_seed(seed)
    kind, hidden, vocab = config["model_type"], config["hidden_size"], config["vocab_size"]

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        fan_in = shape[-2] if len(shape) == 3 and ".experts." in name else shape[-1]
        std = fan_in**-0.5 if len(shape) > 1 and not name.endswith("_bias") else 0.3
        values = (torch.randn(shape, generator=generator) * (0.1 if "norm" in name else std)).to(dtype)
        return values + 1 if "norm" in name and kind not in ZERO_CENTRED else values

    tensors = {"model.embed_tokens.weight": torch.randn(vocab, hidden, generator=generator).to(dtype)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in LAYERS[kind](config, layer).items():
            tensors[f"model.layers.{layer}.{name}"] = make(name, shape)
    tensors["model.norm.weight"] = make("norm", (hidden,))
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = make("lm_head", (vocab, hidden))
    return tensors
