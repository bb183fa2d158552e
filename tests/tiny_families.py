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


def gemma3_config(**overrides: Any) -> Config:
    """Gemma 3: two layers with a window of three, a rotary embedding for each kind; as transformers 4 writes it."""
    config = base_config("Gemma3ForCausalLM", "gemma3_text")
    ropes = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config |= {"num_hidden_layers": 3, "sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24}
    act = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "pad_token_id": 257}
    return {**config, **ropes, **act, **overrides}


def gemma4_config(**overrides: Any) -> Config:
    """Gemma 4: a layer with a window, one of fewer and wider heads whose keys are its values, experts beside both."""
    config = {**base_config("Gemma4ForCausalLM", "gemma4_text"), "sliding_window": 16, "pad_token_id": 257}
    experts = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}
    shape = {"global_head_dim": 32, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
    config |= {**experts, **shape, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    config |= {"layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True}
    return {**config, "hidden_activation": "gelu_pytorch_tanh", "final_logit_softcapping": 30.0, **overrides}


def phi3_config(**overrides: Any) -> Config:
    """Phi-3: q, k and v in one matrix, gate and up in another, half of a head turns, each wave is stretched."""
    rope = {"rope_theta": 1e4, "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "factor": 4.0}
    rope |= {
        "long_factor": [1.0, 3.0, 9.0, 16.0],
        "original_max_position_embeddings": 512,
        "partial_rotary_factor": 0.5,
    }
    config = {**base_config("Phi3ForCausalLM", "phi3"), "rope_parameters": rope, "pad_token_id": 257}
    return {**config, "sliding_window": None, "original_max_position_embeddings": 512, **overrides}


def ministral3_config(**overrides: Any) -> Config:
    """Ministral 3: Mistral whose queries grow with the position."""
    rope = {"rope_parameters": {**_YARN, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1}}
    return {**base_config("Ministral3ForCausalLM", "ministral3"), **rope, "pad_token_id": 257, **overrides}


_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "hidden_act": "silu",
}
_DELTA_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}


def qwen3_next_config(**overrides: Any) -> Config:
    """Qwen3-Next: a gated delta net, then gated attention; experts and a gated shared one in each."""
    config = {**base_config("Qwen3NextForCausalLM", "qwen3_next"), **_DELTA, "rope_parameters": _DELTA_ROPE}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    config |= {**experts, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1, "attention_bias": False}
    return {**config, "layer_types": ["linear_attention", "full_attention"], **overrides}


def qwen3_5_config(**overrides: Any) -> Config:
    """Qwen3.5: the same with projections of their own for queries, gates and steps, and a plain feed-forward."""
    rope = {"rope_parameters": {**_DELTA_ROPE, "mrope_section": [1, 1, 0], "mrope_interleaved": True}}
    config = {**base_config("Qwen3_5ForCausalLM", "qwen3_5_text"), **_DELTA, **rope, "attention_bias": False}
    return {**config, "layer_types": ["linear_attention", "full_attention"], **overrides}


def minimax_m2_config(**overrides: Any) -> Config:
    """MiniMax-M2: queries and keys normed as a whole, half of a head turns, sigmoid scores with a correction."""
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "hidden_act": "silu", "rotary_dim": 8}
    config = {**base_config("MiniMaxM2ForCausalLM", "minimax_m2"), **experts, "intermediate_size": 32}
    return {**config, "rope_theta": 1e4, **overrides}


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


def _feed_forward(config: Config, prefix: str = "mlp", inner: int | None = None) -> Shapes:
    hidden, inner = config["hidden_size"], inner or config["intermediate_size"]
    sizes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {f"{prefix}.{name}.weight": size for name, size in sizes.items()}


def _gemma3_layer(config: Config, _: int) -> Shapes:
    names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    return {
        **_attention(config, bias=False),
        **{f"self_attn.{name}_norm.weight": (config["head_dim"],) for name in "qk"},
        **_norms(config, *(f"{name}_layernorm" for name in names)),
        **_feed_forward(config),
    }


def _qwen3_next_layer(config: Config, layer: int) -> Shapes:
    hidden, dim = config["hidden_size"], config["head_dim"]
    shapes = _norms(config, "input_layernorm", "post_attention_layernorm")
    if config["layer_types"][layer] == "full_attention":
        shapes |= _attention(config, bias=False) | {f"self_attn.{name}_norm.weight": (dim,) for name in "qk"}
        shapes["self_attn.q_proj.weight"] = (2 * config["num_attention_heads"] * dim, hidden)
    else:
        shapes |= {f"linear_attn.{name}": size for name, size in _delta_net(config).items()}
    if "num_experts" not in config:
        return shapes | _feed_forward(config)
    shapes |= {"mlp.gate.weight": (config["num_experts"], hidden), "mlp.shared_expert_gate.weight": (1, hidden)}
    for expert in range(config["num_experts"]):
        shapes |= _feed_forward(config, f"mlp.experts.{expert}", config["moe_intermediate_size"])
    return shapes | _feed_forward(config, "mlp.shared_expert", config["shared_expert_intermediate_size"])


def _delta_net(config: Config) -> Shapes:
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values, conv = heads * config["linear_value_head_dim"], 2 * keys + heads * config["linear_value_head_dim"]
    if config["model_type"] == "qwen3_next":
        projections = {"qkvz": conv + values, "ba": 2 * heads}
    else:
        projections = {"qkv": conv, "z": values, "b": heads, "a": heads}
    return {
        **{f"in_proj_{name}.weight": (size, hidden) for name, size in projections.items()},
        "conv1d.weight": (conv, 1, config["linear_conv_kernel_dim"]),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (config["linear_value_head_dim"],),
        "out_proj.weight": (hidden, values),
    }


def _gemma4_layer(config: Config, layer: int) -> Shapes:
    windowed = config["layer_types"][layer] == "sliding_attention"
    wide = {"head_dim": config["global_head_dim"], "num_key_value_heads": config["num_global_key_value_heads"]}
    own = config if windowed else {**config, **wide}
    count, hidden, inner = config["num_experts"], config["hidden_size"], config["moe_intermediate_size"]
    names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    further = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2")
    shapes = {
        **_attention(own, bias=False),
        **{f"self_attn.{name}_norm.weight": (own["head_dim"],) for name in "qk"},
        **_norms(config, *(f"{name}_layernorm" for name in names), *further),
        **_feed_forward(config),
        "layer_scalar": (1,),
        "router.proj.weight": (count, hidden),
        "router.scale": (hidden,),
        "router.per_expert_scale": (count,),
        "experts.gate_up_proj": (count, 2 * inner, hidden),
        "experts.down_proj": (count, hidden, inner),
    }
    return shapes if windowed else {name: shape for name, shape in shapes.items() if "v_proj" not in name}


def _minimax_m2_layer(config: Config, _: int) -> Shapes:
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    count, block = config["num_local_experts"], "block_sparse_moe"
    shapes = {
        **_attention(config, bias=False),
        "self_attn.q_norm.weight": (config["num_attention_heads"] * dim,),
        "self_attn.k_norm.weight": (config["num_key_value_heads"] * dim,),
        **_norms(config, "input_layernorm", "post_attention_layernorm"),
        f"{block}.gate.weight": (count, hidden),
        f"{block}.e_score_correction_bias": (count,),
    }
    for expert in range(count):
        sizes = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
        shapes |= {f"{block}.experts.{expert}.{name}.weight": size for name, size in sizes.items()}
    return shapes


def _ministral3_layer(config: Config, _: int) -> Shapes:
    norms = _norms(config, "input_layernorm", "post_attention_layernorm")
    return {**_attention(config, bias=False), **norms, **_feed_forward(config)}


def _phi3_layer(config: Config, _: int) -> Shapes:
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    return {
        "self_attn.qkv_proj.weight": ((heads + 2 * kv_heads) * dim, hidden),
        "self_attn.o_proj.weight": (hidden, heads * dim),
        **_norms(config, "input_layernorm", "post_attention_layernorm"),
        "mlp.gate_up_proj.weight": (2 * inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }


LAYERS: Mapping[str, Callable[[Config, int], Shapes]] = {
    "gemma3_text": _gemma3_layer,
    "gemma4_text": _gemma4_layer,
    "gpt_oss": _gpt_oss_layer,
    "minimax_m2": _minimax_m2_layer,
    "ministral3": _ministral3_layer,
    "phi3": _phi3_layer,
    "qwen3_next": _qwen3_next_layer,
    "qwen3_5_text": _qwen3_next_layer,
}
ZERO_CENTRED = ("gemma3_text", "qwen3_next", "qwen3_5_text")  # model types whose norms are stored less 1


def random_tensors(config: Config, seed: int, dtype: torch.dtype) -> Tensors:
    """Norms near 1 (as stored), biases and other vectors small, matrices of norm 1 per row."""
    generator = torch.Generator().manual_seed(seed)
    kind, hidden, vocab = config["model_type"], config["hidden_size"], config["vocab_size"]

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        fan_in = shape[-2] if kind == "gpt_oss" and len(shape) == 3 else shape[-1]
        std = fan_in**-0.5 if len(shape) > 1 and not name.endswith("_bias") else 0.3
        values = (torch.randn(shape, generator=generator) * (0.1 if "norm" in name else std)).to(dtype)
        plain = "norm" in name and (kind not in ZERO_CENTRED or "linear_attn" in name)  # a delta net's own is plain
        return values + 1 if plain else values

    tensors = {"model.embed_tokens.weight": torch.randn(vocab, hidden, generator=generator).to(dtype)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in LAYERS[kind](config, layer).items():
            tensors[f"model.layers.{layer}.{name}"] = make(name, shape)
    tensors["model.norm.weight"] = make("norm", (hidden,))
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = make("lm_head", (vocab, hidden))
    return tensors
