"""The synthetic models that are measured: a mixture of experts, a hybrid with states, and latent attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]
VOCAB = 32000
_COMMON: Config = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Plain:
    """A tensor that stays BF16: normal values of standard deviation `std` about `mean`."""

    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


@dataclass(frozen=True)
class Family:
    """A model as its checkpoint has it.

    packed       [N, K] of each linear that is NVFP4, by its module's name
    plain        every other tensor, by its whole name
    exclude      what hf_quant_config.json says of the modules that are not packed
    moe_layers   layers with a mixture, of `num_experts` each, of which a token passes `top_k`
    state_bytes  of a sequence's states, all layers: read and written by every step
    kv_bytes     of one token's keys and values (or latent vector), all layers
    """

    name: str
    config: Config
    packed: dict[str, tuple[int, int]]
    plain: dict[str, Plain]
    exclude: tuple[str, ...] = ("lm_head", "model.embed_tokens")
    moe_layers: int = 0
    num_experts: int = 0
    top_k: int = 0
    state_bytes: int = 0
    kv_bytes: int = 0

    @property
    def num_parameters(self) -> int:
        return sum(n * k for n, k in self.packed.values()) + sum(math.prod(p.shape) for p in self.plain.values())

    @property
    def num_active(self) -> int:
        """Weights that one token is multiplied by: not the embedding, and of the experts those it is sent to."""
        routed = sum(n * k for name, (n, k) in self.packed.items() if ".experts." in name)
        embedding = VOCAB * int(self.config["hidden_size"])
        rest = self.num_parameters - routed - embedding
        return rest + (routed * self.top_k // self.num_experts if self.num_experts else 0)


def matrix(n: int, k: int) -> Plain:
    return Plain((n, k), k**-0.5)


def vector(size: int) -> Plain:
    return Plain((size,), 0.05, 1.0)


def _ends(hidden: int, embedding: str, norm: str) -> dict[str, Plain]:
    head = Plain((VOCAB, hidden), 2 * hidden**-0.5)
    return {
        f"{embedding}.weight": Plain((VOCAB, hidden), 1.0),
        "lm_head.weight": head,
        f"{norm}.weight": vector(hidden),
    }


def _gated(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    up = {f"{prefix}.{name}": (inner, hidden) for name in ("gate_proj", "up_proj")}
    return up | {f"{prefix}.down_proj": (hidden, inner)}


def _layers(count: int, hidden: int) -> Iterator[tuple[str, dict[str, Plain]]]:
    for i in range(count):
        prefix = f"model.layers.{i}"
        norms = ("input_layernorm", "post_attention_layernorm")
        yield prefix, {f"{prefix}.{name}.weight": vector(hidden) for name in norms}


def mixture(
    name: str, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, experts: int, top_k: int, inner: int
) -> Family:
    """As Qwen3-MoE: every linear but the routers and the head is NVFP4."""
    packed: dict[str, tuple[int, int]] = {}
    plain = _ends(hidden, "model.embed_tokens", "model.norm")
    q, kv = heads * head_dim, kv_heads * head_dim
    for prefix, norms in _layers(layers, hidden):
        plain |= norms | {f"{prefix}.self_attn.{part}_norm.weight": vector(head_dim) for part in "qk"}
        packed |= {f"{prefix}.self_attn.{p}_proj": (n, hidden) for p, n in (("q", q), ("k", kv), ("v", kv))}
        packed[f"{prefix}.self_attn.o_proj"] = (hidden, q)
        plain[f"{prefix}.mlp.gate.weight"] = matrix(experts, hidden)
        for i in range(experts):
            packed |= _gated(f"{prefix}.mlp.experts.{i}", hidden, inner)
    config = _COMMON | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "moe_intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }
    return Family(
        name, config, packed, plain, ("lm_head", "model.embed_tokens", "*.mlp.gate"), layers, experts, top_k,
        kv_bytes=2 * 2 * layers * kv,
    )  # fmt: skip


def hybrid(
    name: str, hidden: int, pattern: str, heads: int, kv_heads: int, head_dim: int, mamba_heads: int, mamba_dim: int,
    state: int, groups: int, inner: int,
) -> Family:  # fmt: skip
    """As Nemotron-H: attention stays BF16, projections of the Mamba-2 layers and the feed-forwards are NVFP4."""
    packed: dict[str, tuple[int, int]] = {}
    plain = _ends(hidden, "backbone.embeddings", "backbone.norm_f")
    width = mamba_heads * mamba_dim
    conv = width + 2 * groups * state
    for i, kind in enumerate(pattern):
        prefix = f"backbone.layers.{i}"
        plain[f"{prefix}.norm.weight"] = vector(hidden)
        mixer = f"{prefix}.mixer"
        if kind == "M":
            packed |= {f"{mixer}.in_proj": (width + conv + mamba_heads, hidden), f"{mixer}.out_proj": (hidden, width)}
            plain |= {
                f"{mixer}.conv1d.weight": Plain((conv, 1, 4), 0.5),
                f"{mixer}.conv1d.bias": Plain((conv,), 0.1),
                f"{mixer}.A_log": Plain((mamba_heads,), 0.5),
                f"{mixer}.dt_bias": Plain((mamba_heads,), 0.5, -2.0),
                f"{mixer}.D": vector(mamba_heads),
                f"{mixer}.norm.weight": vector(width),
            }
        elif kind == "*":
            q, kv = heads * head_dim, kv_heads * head_dim
            plain |= {f"{mixer}.{p}_proj.weight": matrix(n, hidden) for p, n in (("q", q), ("k", kv), ("v", kv))}
            plain[f"{mixer}.o_proj.weight"] = matrix(hidden, q)
        else:
            packed |= {f"{mixer}.up_proj": (inner, hidden), f"{mixer}.down_proj": (hidden, inner)}
    config = _COMMON | {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": len(pattern),
        "hybrid_override_pattern": pattern,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "mamba_num_heads": mamba_heads,
        "mamba_head_dim": mamba_dim,
        "ssm_state_size": state,
        "n_groups": groups,
        "conv_kernel": 4,
        "chunk_size": 128,
        "layer_norm_epsilon": 1e-5,
        "mlp_hidden_act": "relu2",
    }
    mambas, attentions = pattern.count("M"), pattern.count("*")
    return Family(
        name, config, packed, plain, ("lm_head", "backbone.embeddings", "*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"),
        state_bytes=4 * mambas * (width * state + 3 * conv), kv_bytes=2 * 2 * attentions * kv_heads * head_dim,
    )  # fmt: skip


def latent(
    name: str, hidden: int, layers: int, heads: int, q_rank: int, rank: int, nope: int, rope: int, value: int,
    experts: int, top_k: int, inner: int, dense: int,
) -> Family:  # fmt: skip
    """As DeepSeek-V3: attention and head stay BF16, experts and the first, dense, feed-forward are NVFP4."""
    packed: dict[str, tuple[int, int]] = {}
    plain = _ends(hidden, "model.embed_tokens", "model.norm")
    for i, (prefix, norms) in enumerate(_layers(layers, hidden)):
        attention = f"{prefix}.self_attn"
        plain |= norms | {
            f"{attention}.q_a_proj.weight": matrix(q_rank, hidden),
            f"{attention}.q_a_layernorm.weight": vector(q_rank),
            f"{attention}.q_b_proj.weight": matrix(heads * (nope + rope), q_rank),
            f"{attention}.kv_a_proj_with_mqa.weight": matrix(rank + rope, hidden),
            f"{attention}.kv_a_layernorm.weight": vector(rank),
            f"{attention}.kv_b_proj.weight": matrix(heads * (nope + value), rank),
            f"{attention}.o_proj.weight": matrix(hidden, heads * value),
        }
        if i == 0:
            packed |= _gated(f"{prefix}.mlp", hidden, dense)
            continue
        plain[f"{prefix}.mlp.gate.weight"] = matrix(experts, hidden)
        plain[f"{prefix}.mlp.gate.e_score_correction_bias"] = Plain((experts,), 0.05)
        packed |= _gated(f"{prefix}.mlp.shared_experts", hidden, inner)
        for j in range(experts):
            packed |= _gated(f"{prefix}.mlp.experts.{j}", hidden, inner)
    config = _COMMON | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "intermediate_size": dense,
        "moe_intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": q_rank,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "n_routed_experts": experts,
        "num_experts_per_tok": top_k,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
    }
    exclude = ("lm_head", "model.embed_tokens", "*.self_attn*", "*.mlp.gate")
    return Family(name, config, packed, plain, exclude, layers - 1, experts, top_k, kv_bytes=2 * layers * (rank + rope))


MIXTURE = mixture("moe-2.6B", 1024, 24, 16, 4, 128, experts=64, top_k=8, inner=512)
HYBRID = hybrid("hybrid-1B", 2048, "M-" * 3 + "M*-" + "M-" * 4 + "M*-" + "M-" * 3, 32, 8, 64, 64, 64, 128, 8, 8192)
LATENT = latent("latent-1B", 1024, 16, 16, 512, 512, 128, 64, 128, experts=32, top_k=4, inner=512, dense=4096)
FAMILIES = {family.name: family for family in (MIXTURE, HYBRID, LATENT)}
