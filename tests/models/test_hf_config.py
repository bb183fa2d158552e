"""config.json in both spellings, and a refusal by field and value for everything the decoder does not do."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nvfp4_runtime.config import RopeConfig
from nvfp4_runtime.errors import UnsupportedFormatError
from nvfp4_runtime.models.hf_config import parse_model_config
from tests import tiny

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 2048}


def test_transformers_4_and_5_spellings_mean_the_same() -> None:
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}, "torch_dtype": "float32"}
    new = {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}, "dtype": "float32"}
    assert parse_model_config(old) == parse_model_config(new)
    config = parse_model_config(new)
    assert config.rope == RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 2048)
    assert config.dtype == "float32"


def test_absent_fields_take_the_architecture_s_defaults() -> None:
    config = parse_model_config({**LLAMA, "rope_scaling": None})
    assert config.head_dim == 64
    assert config.rope == RopeConfig(theta=10000.0)
    assert config.dtype == "bfloat16"
    assert config.layer_windows == (None,) * 4
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (False, False, False, False)
    assert not config.tie_word_embeddings
    assert parse_model_config(QWEN3).head_dim == 128
    without_kv = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert parse_model_config(without_kv).num_kv_heads == 9


def test_biases_and_qk_norm_follow_the_architecture_and_its_flags() -> None:
    llama = parse_model_config({**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = parse_model_config(QWEN2)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias, qwen2.qk_norm) == (True, False, False, False)
    qwen3 = parse_model_config({**QWEN3, "attention_bias": True})
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (True, True, True)


@pytest.mark.parametrize(
    ("raw", "windows"),
    [
        (MISTRAL | {"sliding_window": 4096}, (4096,) * 4),
        (MISTRAL | {"sliding_window": None}, (None,) * 4),
        (MISTRAL, (4096,) * 4),
        (LLAMA, (None,) * 4),
        (QWEN2 | {"sliding_window": 4096}, (None,) * 4),
        (QWEN2 | {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1}, (None,) * 4),
        (QWEN2 | {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 64)),
        (
            QWEN3
            | {
                "sliding_window": 64,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (64, None, 64, None),
        ),
    ],
)
def test_windows_per_layer(raw: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert parse_model_config(raw).layer_windows == windows


@pytest.mark.parametrize(("stored", "ids"), [(None, ()), (2, (2,)), ([128001, 128009], (128001, 128009))])
def test_eos_may_be_one_id_or_several(stored: object, ids: tuple[int, ...]) -> None:
    assert parse_model_config({**LLAMA, "eos_token_id": stored}).eos_token_ids == ids


def test_yarn_without_a_factor_stretches_to_the_full_length() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": None, "original_max_position_embeddings": 2048}
    assert parse_model_config({**LLAMA, "rope_parameters": rope}).rope.factor == 4.0


def test_original_length_beside_the_rope_fields_takes_precedence() -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}
    raw = {**LLAMA, "rope_scaling": rope, "original_max_position_embeddings": 1024}
    assert parse_model_config(raw).rope.original_max_position_embeddings == 1024


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures is 'MambaForCausalLM'; expected one of DeciLM"),
        ({"architectures": []}, "architectures is []"),
        ({"architectures": None}, "architectures is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected silu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.short_factor is None"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters is"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -2}}, "rope_parameters.factor is -2"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_parameters.low_freq_factor is None"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section is [1, 2]"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": "576"}, "hidden_size is '576'"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; expected a divisor of num_attention_heads (9)"),
        ({"head_dim": 63}, "head_dim is 63"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"sliding_window": 128}, "sliding_window is 128; expected null"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types is 'chunked_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types is ['full_attention']; expected a list of 4"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types is"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused_by_field_and_value(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=re.escape(named)):
        parse_model_config({**LLAMA, **change})


def test_sliding_layers_without_a_window_are_refused() -> None:
    with pytest.raises(UnsupportedFormatError, match="use_sliding_window is False"):
        parse_model_config({**QWEN2, "sliding_window": 64, "layer_types": ["sliding_attention"] * 4})


@pytest.mark.parametrize("value", ["3", [3], None, True, 1.5, -1])
def test_a_count_of_full_layers_that_is_none_is_refused(value: object) -> None:
    raw = QWEN2 | {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": value}
    with pytest.raises(UnsupportedFormatError, match="max_window_layers"):
        parse_model_config(raw)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_experts": None}, "num_experts is None"),
        ({"num_experts": 10**9}, "num_experts is 1000000000"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; expected at most num_experts (8)"),
        ({"num_experts_per_tok": "2"}, "num_experts_per_tok is '2'"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is None"),
        ({"mlp_only_layers": [7]}, "mlp_only_layers is [7]; expected a list of layers from 0 to 1"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'"),
        ({"use_sliding_window": True}, "use_sliding_window is True; expected false for this architecture"),
        ({"n_group": 2}, "n_group is 2; expected 1 for this architecture"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_by_field_and_value(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=re.escape(named)):
        parse_model_config({**tiny.qwen3_moe_config(), **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_group": 3}, "n_group is 3; expected a divisor of 8"),
        ({"n_group": 8}, "n_group is 8"),
        ({"topk_group": 3}, "n_group is 2"),
        ({"n_group": 4, "num_experts_per_tok": 3}, "num_experts_per_tok is 3; expected at most the experts in"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.5}}, "partial_rotary_factor is 1.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.2}}, "an even share of head_dim 16"),
    ],
)
def test_groups_and_partial_rope_that_cannot_be_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=re.escape(named)):
        parse_model_config({**tiny.glm4_moe_config(), **change})
