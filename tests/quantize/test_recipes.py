"""What is quantised, what stays plain and why, and who shares a scale."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvfp4_runtime.checkpoint.shards import TensorInfo
from nvfp4_runtime.quantize import recipes


def info(name: str, shape: tuple[int, ...] = (64, 64), dtype: str = "BF16") -> TensorInfo:
    return TensorInfo(name, dtype, shape, 0, Path("model.safetensors"))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.31.mlp.down_proj.weight",
        "model.layers.3.mlp.experts.7.gate_proj.weight",
        "model.language_model.layers.3.mlp.up_proj.weight",
    ],
)
def test_linears_inside_the_blocks_are_quantised(name):
    assert recipes.why_plain(info(name), ()) is None


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (info("lm_head.weight"), "outside the decoder blocks"),
        (info("model.embed_tokens.weight"), "outside the decoder blocks"),
        (info("model.layers.0.input_layernorm.weight", (64,)), "no weight matrix"),
        (info("model.layers.0.self_attn.q_proj.bias", (64,)), "no weight matrix"),
        (info("model.layers.0.mlp.gate.weight"), "kept plain by the recipe"),
        (info("model.layers.0.linear_attn.conv1d.weight"), "kept plain by the recipe"),
        (info("visual.blocks.0.attn.qkv.weight"), "kept plain by the recipe"),
        (info("model.layers.0.mlp.experts.up.weight", (8, 64, 64)), "not two-dimensional"),
        (info("model.layers.0.mlp.up_proj.weight", (64, 24)), "input features (24) no multiple of 16"),
        (info("model.layers.2.mlp.up_proj.weight"), "excluded by the caller"),
    ],
)
def test_everything_else_stays_plain_for_a_stated_reason(tensor, reason):
    assert recipes.why_plain(tensor, ("model.layers.2.*",)) == reason


def test_layers_of_one_input_share_a_group_and_others_do_not():
    attn, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert len({recipes.fused_group(f"{attn}.{p}_proj") for p in "qkv"}) == 1
    assert recipes.fused_group(f"{mlp}.gate_proj") == recipes.fused_group(f"{mlp}.up_proj")
    names = [f"{attn}.q_proj", f"{attn}.o_proj", f"{mlp}.gate_proj", f"{mlp}.down_proj"]
    names.append("model.layers.1.self_attn.q_proj")
    assert len({recipes.fused_group(name) for name in names}) == len(names)
    assert recipes.fused_group(f"{mlp}.experts.0.w1") == recipes.fused_group(f"{mlp}.experts.0.w3")
    assert recipes.fused_group(f"{mlp}.experts.0.w1") != recipes.fused_group(f"{mlp}.experts.1.w1")
