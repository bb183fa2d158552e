"""config.json of Nemotron-H and Nemotron 3: layers that are one thing each."""

from __future__ import annotations

from nvfp4_runtime.config import Block, Mamba2Config, ModelConfig, MoEConfig, RopeConfig
from nvfp4_runtime.models.config_values import (
    Raw,
    count,
    declared_dtype,
    flag,
    number,
    token_ids,
    unsupported,
)
from nvfp4_runtime.models.hf_moe import Router, parse_moe

ARCHITECTURE = "NemotronHForCausalLM"
_PATTERN: dict[str, Block] = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_TYPES: dict[str, Block] = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}
_ROUTER = Router(scoring="sigmoid", dense="none")
# Arithmetic that no published checkpoint asks for.
_NEUTRAL = {
    "attention_bias": False,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "sliding_window": None,
    "use_bias": False,
    "use_conv_bias": True,
}


def parse_nemotron_h(raw: Raw) -> ModelConfig:
    """Raises UnsupportedFormatError naming field and value for what is not done here or cannot be."""
    for field, neutral in _NEUTRAL.items():
        if raw.get(field) not in (None, neutral):
            raise unsupported(field, raw[field], f"{neutral} or nothing")
    heads, hidden = count(raw, "num_attention_heads"), count(raw, "hidden_size")
    kv_heads = count(raw, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise unsupported("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
    blocks = _blocks(raw)
    if "attention" not in blocks:
        raise unsupported("layers_block_type", list(blocks), "at least one layer of attention")
    return ModelConfig(
        architecture=ARCHITECTURE,
        vision_class=str(raw.get("vision_class", "")),
        model_type=str(raw.get("model_type", "")),
        hidden_size=hidden,
        intermediate_size=count(raw, "intermediate_size", hidden),
        num_layers=len(blocks),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=count(raw, "head_dim", count(raw, "attention_head_dim", hidden // heads)),
        vocab_size=count(raw, "vocab_size"),
        max_position_embeddings=count(raw, "max_position_embeddings"),
        rms_norm_eps=number(raw, "layer_norm_epsilon", 1e-5),
        rope=RopeConfig(),
        tie_word_embeddings=flag(raw, "tie_word_embeddings"),
        layer_windows=(None,) * len(blocks),
        dtype=declared_dtype(raw),
        bos_token_id=next(iter(token_ids(raw, "bos_token_id")), None),
        eos_token_ids=token_ids(raw, "eos_token_id"),
        moe=_experts(raw, len(blocks)) if "moe" in blocks else None,
        mamba=_mamba(raw),
        blocks=blocks,
    )


def _blocks(raw: Raw) -> tuple[Block, ...]:
    pattern = raw.get("hybrid_override_pattern")
    types = next((raw[f] for f in ("layers_block_type", "layer_types") if raw.get(f) is not None), None)
    if types is None and isinstance(pattern, str) and pattern and {*pattern} <= _PATTERN.keys():
        return tuple(_PATTERN[letter] for letter in pattern)
    if isinstance(types, list) and types and all(isinstance(kind, str) and kind in _TYPES for kind in types):
        return tuple(_TYPES[kind] for kind in types)
    if types is not None:
        raise unsupported("layers_block_type", types, f"a list of {', '.join(_TYPES)}")
    raise unsupported("hybrid_override_pattern", pattern, "a letter per layer, of M, *, - and E")


def _mamba(raw: Raw) -> Mamba2Config:
    heads, groups = count(raw, "mamba_num_heads"), count(raw, "n_groups", count(raw, "mamba_n_groups", 8))
    head_dim = count(raw, "mamba_head_dim")
    if heads % groups:
        raise unsupported("n_groups", groups, f"a divisor of mamba_num_heads ({heads})")
    width = count(raw, "conv_kernel", count(raw, "mamba_d_conv", 4))
    if not 2 <= width <= 16:
        raise unsupported("conv_kernel", width, "2 to 16")
    return Mamba2Config(
        num_heads=heads,
        head_dim=head_dim,
        state_size=count(raw, "ssm_state_size", 128),
        num_groups=groups,
        conv_width=width,
        min_step=number(raw, "time_step_min", number(raw, "mamba_dt_min", 0.001)),
    )


def _experts(raw: Raw, num_layers: int) -> MoEConfig:
    shared = count(raw, "moe_shared_expert_intermediate_size") if raw.get("n_shared_experts", 1) else 0
    latent = raw.get("moe_latent_size")
    return parse_moe(raw, _ROUTER, num_layers, shared, False, 0 if latent is None else count(raw, "moe_latent_size"))
