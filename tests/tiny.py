"""Small checkpoints written from scratch, in each dialect, for any test that needs a model folder.

A model is a config dict and a dict of tensors under Hugging Face names; `write_plain` and `write_modelopt` save the
same pair in their own way, so one model saved twice must load to one answer. Random weights, seeded.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nvfp4_runtime.nvfp4 import codec
from tests import tiny_families

Config = dict[str, Any]
Tensors = dict[str, Tensor]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LATENT_LINEARS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
MAMBA_LINEARS = ("in_proj", "out_proj", "in_proj_qkvz", "in_proj_qkv", "in_proj_z")
LINEARS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "w1",
    "w2",
    "w3",
    "qkv_proj",
    "gate_up_proj",
    *LATENT_LINEARS,
)
STACKS = ("experts.gate_up_proj", "experts.down_proj")
_SIGMOID = ("glm4_moe", "glm4_moe_lite", "deepseek_v3")  # DeepSeek-V3's router
_FUSED = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "w1": "gate_up",
    "w3": "gate_up",
}


def llama_config(**overrides: Any) -> Config:
    """A two-layer Llama with grouped-query attention; every linear's K is a multiple of 16."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "dtype": "float32",
    }
    return {**config, **overrides}


def qwen2_config(**overrides: Any) -> Config:
    """Qwen2: biases on q, k and v."""
    config = llama_config(architectures=["Qwen2ForCausalLM"], model_type="qwen2", use_sliding_window=False)
    return {**config, **overrides}


def qwen3_config(**overrides: Any) -> Config:
    """Qwen3: RMSNorm on every query and key head."""
    config = llama_config(architectures=["Qwen3ForCausalLM"], model_type="qwen3", use_sliding_window=False)
    return {**config, **overrides}


def mixtral_config(**overrides: Any) -> Config:
    """Mixtral: the best two of four experts."""
    config = llama_config(architectures=["MixtralForCausalLM"], model_type="mixtral", sliding_window=None)
    return {**config, "num_local_experts": 4, "num_experts_per_tok": 2, **overrides}


def qwen2_moe_config(**overrides: Any) -> Config:
    """Qwen2-MoE: biases on q, k and v, a gated shared expert beside the routed ones."""
    config = qwen2_config(architectures=["Qwen2MoeForCausalLM"], model_type="qwen2_moe")
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return {**config, **sizes, "shared_expert_intermediate_size": 48, "norm_topk_prob": False, **overrides}


def qwen3_moe_config(**overrides: Any) -> Config:
    """Qwen3-MoE: normed heads, eight experts in every layer."""
    config = qwen3_config(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe")
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return {**config, **sizes, "norm_topk_prob": True, **overrides}


def glm4_moe_config(**overrides: Any) -> Config:
    """GLM-4-MoE: half of a head turns, sigmoid scores with a correction, a dense first layer, one shared expert."""
    config = llama_config(architectures=["Glm4MoeForCausalLM"], model_type="glm4_moe", attention_bias=True)
    config["rope_parameters"] = {**config["rope_parameters"], "partial_rotary_factor": 0.5}
    sizes = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
    router = {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
    return {**config, **sizes, **router, "norm_topk_prob": True, "use_qk_norm": True, **overrides}


def deepseek_v3_config(**overrides: Any) -> Config:
    """DeepSeek-V3: latent attention, and the mixture that GLM-4-MoE took over."""
    config = glm4_moe_config(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", attention_bias=False)
    del config["head_dim"], config["use_qk_norm"]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0}
    rope = {"rope_theta": 10000.0, **yarn, "mscale_all_dim": 1.0}
    sizes = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    return {**config, "num_key_value_heads": 4, "rope_parameters": rope, **sizes, **overrides}


def glm4_moe_lite_config(**overrides: Any) -> Config:
    """GLM-4.7-Flash: DeepSeek-V3's layers without YaRN."""
    config = deepseek_v3_config(architectures=["Glm4MoeLiteForCausalLM"], model_type="glm4_moe_lite")
    types = ["dense"] + ["sparse"] * (config["num_hidden_layers"] - 1)
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    return {**config, "rope_parameters": rope, "n_group": 1, "mlp_layer_types": types, **overrides}


def nemotron_h_config(**overrides: Any) -> Config:
    """Nemotron-H: Mamba-2, experts, attention and a plain feed-forward, a layer each."""
    base = llama_config(architectures=["NemotronHForCausalLM"], model_type="nemotron_h", num_hidden_layers=5)
    kept = ("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
    rest = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "dtype")
    mamba = {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
    return {
        **{field: base[field] for field in (*kept, *heads, *rest)},
        **mamba,
        **experts,
        "hybrid_override_pattern": "ME*M-",
        "layer_norm_epsilon": 1e-5,
        "mlp_hidden_act": "relu2",
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 64,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        **overrides,
    }


def nemotron_h_shapes(config: Config, kind: str) -> dict[str, tuple[int, ...]]:
    """A layer's tensors but its norm, by the letter of its kind; names as the hub's files have them."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    conv = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    heads = config["mamba_num_heads"]

    def feed_forward(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{prefix}up_proj.weight": (width, hidden), f"{prefix}down_proj.weight": (hidden, width)}

    if kind == "M":
        return {
            "in_proj.weight": (inner + conv + heads, hidden),
            "out_proj.weight": (hidden, inner),
            "conv1d.weight": (conv, 1, config["conv_kernel"]),
            "conv1d.bias": (conv,),
            "A_log": (heads,),
            "dt_bias": (heads,),
            "D": (heads,),
            "norm.weight": (inner,),
        }
    if kind == "*":
        queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
        sizes = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        return {f"{name}.weight": size for name, size in (sizes | {"o_proj": (hidden, queries)}).items()}
    if kind == "-":
        return feed_forward("", config["intermediate_size"])
    shapes: dict[str, tuple[int, ...]] = {
        "gate.weight": (config["n_routed_experts"], hidden),
        "gate.e_score_correction_bias": (config["n_routed_experts"],),
    }
    for expert in range(config["n_routed_experts"]):
        shapes |= feed_forward(f"experts.{expert}.", config["moe_intermediate_size"])
    return shapes | feed_forward("shared_experts.", config["moe_shared_expert_intermediate_size"])


def _nemotron_h_tensors(config: Config, seed: int, dtype: torch.dtype) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], std: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    hidden, vocab = config["hidden_size"], config["vocab_size"]
    tensors = {"backbone.embeddings.weight": normal((vocab, hidden), 1.0)}
    for layer, kind in enumerate(config["hybrid_override_pattern"]):
        prefix = f"backbone.layers.{layer}"
        tensors[f"{prefix}.norm.weight"] = 1 + normal((hidden,), 0.1)
        for name, shape in nemotron_h_shapes(config, kind).items():
            std = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
            tensors[f"{prefix}.mixer.{name}"] = normal(shape, std) + (1 if name == "norm.weight" else 0)
    tensors["backbone.norm_f.weight"] = 1 + normal((hidden,), 0.1)
    tensors["lm_head.weight"] = normal((vocab, hidden), hidden**-0.5)
    return tensors


def random_tensors(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """Weights for `config` in Hugging Face names; norms near 1, biases and matrices small normals."""
    if config["model_type"] == "nemotron_h":
        return _nemotron_h_tensors(config, seed, dtype)
    if config["model_type"] in tiny_families.LAYERS:
        return tiny_families.random_tensors(config, seed, dtype)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    kind = config["model_type"]
    qkv_bias = kind in ("qwen2", "qwen2_moe") or bool(config.get("attention_bias"))
    o_bias = bool(config.get("attention_bias")) and kind not in ("qwen2", "qwen2_moe", "glm4_moe")
    shapes = {
        "self_attn.q_proj": (heads * head_dim, hidden, qkv_bias),
        "self_attn.k_proj": (kv_heads * head_dim, hidden, qkv_bias),
        "self_attn.v_proj": (kv_heads * head_dim, hidden, qkv_bias),
        "self_attn.o_proj": (hidden, heads * head_dim, o_bias),
    }
    latent = _latent_shapes(config)
    if latent:
        shapes = {name: (*shape, False) for name, shape in latent.items() if len(shape) == 2}
    dense = {
        "mlp.gate_proj": (inner, hidden, bool(config.get("mlp_bias"))),
        "mlp.up_proj": (inner, hidden, bool(config.get("mlp_bias"))),
        "mlp.down_proj": (hidden, inner, bool(config.get("mlp_bias"))),
    }
    tensors = {"model.embed_tokens.weight": normal(vocab, hidden, std=1.0)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        mixture = _mixture_shapes(config, layer)
        for name, (n, k, bias) in {**shapes, **(mixture or dense)}.items():
            tensors[f"{prefix}.{name}.weight"] = normal(n, k, std=k**-0.5)
            if bias:
                tensors[f"{prefix}.{name}.bias"] = normal(n, std=0.1)
        for name, shape in latent.items():
            if len(shape) == 1:
                tensors[f"{prefix}.{name}.weight"] = 1 + normal(*shape, std=0.1)
        if mixture and kind in _SIGMOID:
            tensors[f"{prefix}.mlp.gate.e_score_correction_bias"] = normal(config["n_routed_experts"], std=0.1)
        if kind in ("qwen3", "qwen3_moe") or config.get("use_qk_norm"):
            tensors[f"{prefix}.self_attn.q_norm.weight"] = 1 + normal(head_dim, std=0.1)
            tensors[f"{prefix}.self_attn.k_norm.weight"] = 1 + normal(head_dim, std=0.1)
        tensors[f"{prefix}.input_layernorm.weight"] = 1 + normal(hidden, std=0.1)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = 1 + normal(hidden, std=0.1)
    tensors["model.norm.weight"] = 1 + normal(hidden, std=0.1)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(vocab, hidden, std=hidden**-0.5)
    return tensors


def _latent_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The matrices and norms of latent attention; none for other models."""
    if "kv_lora_rank" not in config:
        return {}
    hidden, heads, rank, q_rank = (
        config[f] for f in ("hidden_size", "num_attention_heads", "kv_lora_rank", "q_lora_rank")
    )
    nope, rope, v = (config[f] for f in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa": (rank + rope, hidden),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (heads * (nope + v), rank),
        "o_proj": (hidden, heads * v),
    }
    if q_rank is None:
        shapes["q_proj"] = (heads * (nope + rope), hidden)
    else:
        shapes |= {
            "q_a_proj": (q_rank, hidden),
            "q_a_layernorm": (q_rank,),
            "q_b_proj": (heads * (nope + rope), q_rank),
        }
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _mixture_shapes(config: Config, layer: int) -> dict[str, tuple[int, int, bool]]:
    """The matrices of a layer's mixture of experts under the hub's names; none where the layer has none."""
    kind, hidden = config["model_type"], config["hidden_size"]
    if kind not in ("mixtral", "qwen2_moe", "qwen3_moe", *_SIGMOID):
        return {}
    if layer < config.get("first_k_dense_replace", 0) or layer in config.get("mlp_only_layers", ()):
        return {}
    block = "block_sparse_moe" if kind == "mixtral" else "mlp"
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")

    def feed_forward(prefix: str, inner: int) -> dict[str, tuple[int, int, bool]]:
        sizes = {gate: (inner, hidden, False), up: (inner, hidden, False), down: (hidden, inner, False)}
        return {f"{block}.{prefix}.{name}": size for name, size in sizes.items()}

    field = next(name for name in ("num_local_experts", "num_experts", "n_routed_experts") if name in config)
    inner = config["intermediate_size"] if kind == "mixtral" else config["moe_intermediate_size"]
    shapes = {f"{block}.gate": (config[field], hidden, False)}
    for expert in range(config[field]):
        shapes |= feed_forward(f"experts.{expert}", inner)
    if kind == "qwen2_moe":
        shapes |= feed_forward("shared_expert", config["shared_expert_intermediate_size"])
        shapes[f"{block}.shared_expert_gate"] = (1, hidden, False)
    if kind in _SIGMOID:
        shapes |= feed_forward("shared_experts", inner * config["n_shared_experts"])
    return shapes


def write_plain(
    folder: Path, config: Config, tensors: Mapping[str, Tensor], *, shards: int = 1, tokenizer: bool = True
) -> Path:
    """Save as an unquantised Hugging Face folder; tensors keep their dtype. Returns `folder`."""
    _write_common(folder, config, tokenizer)
    save_shards(folder, tensors, shards)
    return folder


def write_modelopt(
    folder: Path,
    config: Config,
    tensors: Mapping[str, Tensor],
    *,
    exclude: Sequence[str] = ("lm_head", "model.embed_tokens"),
    input_scale: float | None = 0.01,
    kv_scales: tuple[float, float] | None = None,
    share_scale_2: bool = True,
    shards: int = 1,
    tokenizer: bool = True,
) -> Path:
    """Save in ModelOpt's NVFP4 layout: every block linear not matched by `exclude` packed, the rest as given.

    input_scale    the same for every layer, or None for W4A16_NVFP4
    kv_scales      (k_scale, v_scale) of an FP8 KV cache, or None
    share_scale_2  False gives q/k/v and gate/up a weight_scale_2 each, as old exports did
    """
    algo = "W4A16_NVFP4" if input_scale is None else "NVFP4"
    producer = {"name": "modelopt", "version": "0.47.0"}
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    section: Config = {
        "config_groups": {"group_0": {"input_activations": weights, "weights": weights, "targets": ["Linear"]}},
        "ignore": list(exclude),
        "quant_algo": algo,
        "producer": producer,
        "quant_method": "modelopt",
    }
    if input_scale is None:
        del section["config_groups"]["group_0"]["input_activations"]
    if kv_scales is not None:
        section["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    _write_common(folder, {**config, "quantization_config": section}, tokenizer)
    record = {
        "quant_algo": algo,
        "kv_cache_quant_algo": "FP8" if kv_scales is not None else None,
        "group_size": 16,
        "exclude_modules": list(exclude),
    }
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": producer, "quantization": record}, indent=2))
    save_shards(folder, pack_tensors(tensors, exclude, input_scale, kv_scales, share_scale_2), shards)
    return folder


def pack_tensors(
    tensors: Mapping[str, Tensor],
    exclude: Sequence[str],
    input_scale: float | None,
    kv_scales: tuple[float, float] | None,
    share_scale_2: bool,
) -> Tensors:
    """The tensors of `write_modelopt`."""
    packed = {name: t for name, t in tensors.items() if not _is_packed(name, exclude)}
    for name in [name for name in packed if name.endswith(STACKS)]:
        _pack_stack(packed, name, input_scale, turned=f"{name}_bias" in tensors)  # gpt-oss alone has biases
    amax: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _is_packed(name, exclude):
            group = _group(name, share_scale_2)
            amax[group] = torch.maximum(amax.get(group, torch.tensor(0.0)), tensor.abs().max().float())
    for name, tensor in tensors.items():
        if not _is_packed(name, exclude):
            continue
        module = name.removesuffix(".weight")
        scale_2 = codec.weight_scale_2(amax[_group(name, share_scale_2)])
        packed[name], packed[f"{module}.weight_scale"] = codec.quantize(tensor, scale_2)
        packed[f"{module}.weight_scale_2"] = scale_2
        if input_scale is not None:
            packed[f"{module}.input_scale"] = torch.tensor(input_scale)
        if kv_scales is not None and module.endswith("k_proj"):
            packed[f"{module}.k_scale"] = torch.tensor(kv_scales[0])
        if kv_scales is not None and module.endswith("v_proj"):
            packed[f"{module}.v_scale"] = torch.tensor(kv_scales[1])
    return packed


def _pack_stack(tensors: Tensors, name: str, input_scale: float | None, turned: bool) -> None:
    """A stack of experts [E, N, K], or [E, K, N] if `turned`, packed and scaled along K, axes in the order they had."""
    parts: list[list[Tensor]] = [[], [], []]
    for expert in tensors.pop(name):
        scale_2 = codec.weight_scale_2(expert.abs().max().float())
        codes, scale = codec.quantize(expert.t().contiguous() if turned else expert, scale_2)
        scale = scale.view(torch.uint8)
        pair = (codes.t(), scale.t()) if turned else (codes, scale)
        for part, value in zip(parts, (*pair, scale_2), strict=True):
            part.append(value)
    codes, scales, scale_2 = (torch.stack(part).contiguous() for part in parts)
    tensors |= {
        name: codes,
        f"{name}_weight_scale": scales.view(torch.float8_e4m3fn),
        f"{name}_weight_scale_2": scale_2,
    }
    if input_scale is not None:
        tensors[f"{name}_input_scale"] = torch.full((len(codes),), input_scale)


def _unpacked(codes: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    return codec.dequantize(codes.contiguous(), scale.contiguous().view(torch.float8_e4m3fn), scale_2)


def unpack(tensors: Mapping[str, Tensor]) -> Tensors:
    """ModelOpt's tensors back to plain ones."""
    plain = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and f"{module}.weight_scale_2" in tensors:
            scales = tensors[f"{module}.weight_scale"], tensors[f"{module}.weight_scale_2"]
            plain[name] = codec.dequantize(tensor, *scales)
        elif f"{name}_weight_scale_2" in tensors:
            stacks = (tensor, tensors[f"{name}_weight_scale"].view(torch.uint8), tensors[f"{name}_weight_scale_2"])
            turned = stacks[0].shape[2] == stacks[1].shape[2]
            experts = [
                _unpacked(codes.t(), scale.t(), scale_2).t() if turned else _unpacked(codes, scale, scale_2)
                for codes, scale, scale_2 in zip(*stacks, strict=True)
            ]
            plain[name] = torch.stack(experts).contiguous()
        elif "weight_scale" not in leaf and not leaf.endswith("input_scale"):
            plain[name] = tensor
    return plain


def save_shards(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """model.safetensors, or `shards` files dealt round-robin (so scales part from their weights) with their index."""
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = {name: tensors[name] for name in names[i::shards]}
        save_file(mine, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tiny_llama(folder: Path, seed: int = 0, tokenizer: bool = True, **overrides: Any) -> Path:
    """A plain two-layer Llama; `overrides` go into config.json."""
    config = llama_config(**overrides)
    return write_plain(folder, config, random_tensors(config, seed), tokenizer=tokenizer)


def tiny_qwen2(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    return _tiny(folder, qwen2_config(**overrides), seed)


def tiny_qwen3(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    return _tiny(folder, qwen3_config(**overrides), seed)


def tiny_nvfp4_llama(
    folder: Path,
    seed: int = 0,
    kv_scales: tuple[float, float] | None = None,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """The tensors of `tiny_llama` in ModelOpt's NVFP4 layout."""
    config = llama_config(**overrides)
    tensors = random_tensors(config, seed)
    return write_modelopt(folder, config, tensors, kv_scales=kv_scales, tokenizer=tokenizer)


def save_transformers(folder: Path, model: Any, *, modelopt: bool = False, shards: int = 1, **options: Any) -> Path:
    """Save a transformers model built by the caller, plain or as ModelOpt NVFP4 (`options` as in `write_modelopt`)."""
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    tied = config.get("tie_word_embeddings")
    tensors = {
        name: tensor.detach().clone().contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    if modelopt:
        return write_modelopt(folder, config, tensors, shards=shards, **options)
    return write_plain(folder, config, tensors, shards=shards)


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges (one id per byte below 256, then the special tokens) and a ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[2],
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _tiny(folder: Path, config: Config, seed: int) -> Path:
    return write_plain(folder, config, random_tensors(config, seed))


def _write_common(folder: Path, config: Config, tokenizer: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer:
        write_tokenizer(folder)


def _is_packed(name: str, exclude: Sequence[str]) -> bool:
    module, _, kind = name.rpartition(".")
    linear = (
        kind == "weight"
        and re.match(r"(model|backbone)\.layers\.\d+\.", name)
        and module.rpartition(".")[2] in (*LINEARS, *LATENT_LINEARS, *MAMBA_LINEARS)
    )
    return bool(linear) and not any(fnmatch.fnmatchcase(module, pattern) for pattern in exclude)


def _group(name: str, share: bool) -> str:
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    return f"{parent}.{_FUSED.get(leaf, leaf)}" if share else name
