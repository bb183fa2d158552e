"""config.json of the families whose file says it otherwise: defaults of their class, old spellings, and refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from nvfp4_runtime.config import Gate, RopeConfig
from nvfp4_runtime.errors import UnsupportedFormatError
from nvfp4_runtime.models.hf_config import parse_model_config
from tests import tiny_families as families

GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}


def test_what_a_published_gemma3_leaves_out_is_its_class_s() -> None:
    config = parse_model_config(GEMMA3)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262_208)
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 131_072
    assert config.layer_windows[:6] == (1024,) * 5 + (None,)
    assert (config.rope.theta, config.rope.kind, config.rope.factor) == (1e6, "linear", 8.0)
    assert config.local_rope == RopeConfig(theta=1e4)
    assert config.attention_scale == 256**-0.5
    assert config.gate == Gate("gelu_tanh")


def test_gemma4_s_layers_without_a_window_have_heads_of_their_own_and_the_last_is_one() -> None:
    raw = families.gemma4_config(num_hidden_layers=7, layer_types=None, global_head_dim=None)
    config = parse_model_config({name: value for name, value in raw.items() if value is not None})
    assert [layer.windowed for layer in config.gemma4] == [True] * 5 + [False, False]
    assert {(layer.num_kv_heads, layer.head_dim, layer.key_is_value) for layer in config.gemma4} == {
        (2, 16, False),
        (1, 512, True),
    }
    assert config.rope == RopeConfig(theta=1e6, kind="proportional", partial_rotary_factor=0.25)
    assert config.final_softcap == 30.0


def test_phi3_s_first_name_of_longrope_and_its_attention_factor() -> None:
    raw = families.phi3_config(rope_parameters=None, rope_theta=1e4, partial_rotary_factor=0.5)
    old = {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = parse_model_config({**raw, "rope_scaling": old, "original_max_position_embeddings": 64})
    assert config.rope.kind == "longrope"
    assert config.rope.attention_factor == pytest.approx((1 + 3 / 6) ** 0.5)  # ln 8 / ln 64
    assert config.fused


def test_qwen3_next_counts_its_layers_of_attention_where_the_file_lists_none() -> None:
    raw = families.qwen3_next_config(num_hidden_layers=8, layer_types=None)
    config = parse_model_config(raw)
    assert config.delta is not None
    assert config.delta.layers == (True, True, True, False) * 2
    assert config.delta.joined
    assert config.rotary_dim == 4


def test_minimax_says_in_dimensions_what_turns() -> None:
    assert parse_model_config(families.minimax_m2_config()).rotary_dim == 8


@pytest.mark.parametrize(
    ("make", "change", "named"),
    [
        (families.gemma3_config, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (families.gemma3_config, {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        (families.gemma3_config, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        (families.gemma3_config, {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters is"),
        (families.gemma3_config, {"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        (families.gemma3_config, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        (families.gemma4_config, {"num_kv_shared_layers": 1}, "num_kv_shared_layers is 1"),
        (families.gemma4_config, {"hidden_size_per_layer_input": None, "layer_types": 3}, "layer_types is 3"),
        (families.gemma4_config, {"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input is 256"),
        (families.gemma4_config, {"num_global_key_value_heads": 3}, "num_global_key_value_heads is 3"),
        (families.gemma4_config, {"global_head_dim": 31}, "global_head_dim is 31"),
        (families.gemma4_config, {"top_k_experts": 9}, "top_k_experts is 9; expected at most num_experts (8)"),
        (families.gemma4_config, {"rope_parameters": [1]}, "rope_parameters is [1]"),
        (families.phi3_config, {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "short_factor is None"),
        (
            families.phi3_config,
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}},
            "short_factor is [1.0, 1.0, 1.0]; expected 8 numbers",
        ),
        (families.qwen3_next_config, {"layer_types": ["linear_attention"] * 2}, "at least one full_attention"),
        (families.qwen3_next_config, {"layer_types": ["mamba"] * 2}, "layer_types is ['mamba', 'mamba']"),
        (families.qwen3_next_config, {"linear_num_value_heads": 3}, "linear_num_value_heads is 3; expected a multiple"),
        (families.qwen3_next_config, {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1; expected 2 to 16"),
        (families.minimax_m2_config, {"rotary_dim": "8"}, "rotary_dim is '8'"),
        (families.ministral3_config, {"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    ],
)
def test_what_cannot_be_is_refused_by_field_and_value(
    make: Callable[[], dict[str, Any]], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedFormatError, match=re.escape(named)):
        parse_model_config({**make(), **change})
