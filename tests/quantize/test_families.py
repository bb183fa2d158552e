"""Weight-only quantisation of families whose files keep experts in stacks, hybrids and vision-language classes: what
comes out is read by our loader, and computes what the dequantised weights compute in the files' own layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.models import load_model
from nvfp4_runtime.nvfp4.codec import E2M1_MAX
from nvfp4_runtime.quantize.ptq import quantize_checkpoint
from tests import tiny, tiny_families
from tests.models.paged import PagedRunner
from tests.models.test_vision import LAYOUTS, prefixed

PROMPT = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(1)).tolist()


def stacked(tensors: tiny.Tensors, turned: bool) -> tiny.Tensors:
    """Single experts as stacks, gate above up; `turned`: each matrix transposed."""
    rest, found = {}, dict[str, dict[str, list[Tensor]]]()
    for name, tensor in tensors.items():
        prefix, inside, tail = name.partition(".experts.")
        if inside:
            found.setdefault(f"{prefix}.experts", {}).setdefault(tail.split(".")[1], []).append(tensor)
        else:
            rest[name] = tensor
    for prefix, leaves in found.items():
        gate_up = [torch.cat(pair) for pair in zip(leaves["gate_proj"], leaves["up_proj"], strict=True)]
        for leaf, each in (("gate_up_proj", gate_up), ("down_proj", leaves["down_proj"])):
            rest[f"{prefix}.{leaf}"] = torch.stack([m.t() if turned else m for m in each]).contiguous()
    return rest


def vision(layout: str) -> tuple[tiny.Config, tiny.Tensors]:
    architecture, text, nested, root, head, name = LAYOUTS[layout]
    config = {**nested({**text, "architectures": None}), "architectures": [architecture], "model_type": "vl"}
    tensors = prefixed(tiny.random_tensors(text, seed=4), root, head)
    return config, tensors | {name: torch.ones(32, 32)}


def qwen3_vl_moe() -> tuple[tiny.Config, tiny.Tensors]:
    """The hub's Qwen3-VL mixtures: stacks of transposed matrices, gate before up."""
    text = tiny.qwen3_moe_config()
    tensors = prefixed(stacked(tiny.random_tensors(text, seed=4), turned=True), "model.language_model", "lm_head")
    config = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"}
    config |= {"text_config": {**text, "architectures": None}}
    return config, tensors | {"model.visual.blocks.0.attn.qkv.weight": torch.ones(32, 32)}


def gemma4_vl() -> tuple[tiny.Config, tiny.Tensors]:
    """A tower whose layers are numbered like a decoder's, and must stay plain all the same."""
    text = tiny_families.gemma4_config()
    tensors = prefixed(tiny.random_tensors(text, seed=4), "model.language_model", "lm_head")
    config = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "text_config": text}
    return config, tensors | {"model.audio_tower.layers.0.q_proj.weight": torch.ones(32, 32)}


def alone(config: tiny.Config, turned: bool | None = None) -> tuple[tiny.Config, tiny.Tensors]:
    tensors = tiny.random_tensors(config, seed=4)
    return config, tensors if turned is None else stacked(tensors, turned)


# name -> (config.json and tensors, a module that must be NVFP4, one that must stay plain)
CASES: dict[str, tuple[Callable[[], tuple[tiny.Config, tiny.Tensors]], str, str]] = {
    "gpt-oss": (
        lambda: alone(tiny_families.gpt_oss_config()),
        "model.layers.0.mlp.experts.3.up_proj",
        "model.layers.0.mlp.router",
    ),
    "Gemma 4": (
        lambda: alone(tiny_families.gemma4_config()),
        "model.layers.1.experts.7.down_proj",
        "model.layers.1.router.proj",
    ),
    "Qwen3-Next": (
        lambda: alone(tiny_families.qwen3_next_config()),
        "model.layers.0.linear_attn.in_proj_qkvz",
        "model.layers.0.linear_attn.in_proj_ba",
    ),
    "Qwen3-Next, stacks": (
        lambda: alone(tiny_families.qwen3_next_config(), turned=False),
        "model.layers.1.mlp.experts.0.gate_proj",
        "model.layers.1.mlp.shared_expert_gate",
    ),
    "Qwen3.5": (
        lambda: alone(tiny_families.qwen3_5_config()),
        "model.layers.0.linear_attn.in_proj_z",
        "model.layers.0.linear_attn.in_proj_b",
    ),
    "Nemotron-H": (
        lambda: alone(tiny.nemotron_h_config()),
        "backbone.layers.1.mixer.experts.0.up_proj",
        "backbone.layers.1.mixer.gate",
    ),
    "Qwen3.5 with vision": (
        lambda: vision("Qwen3.5"),
        "model.language_model.layers.0.linear_attn.out_proj",
        "model.visual.merger.norm",
    ),
    "Nemotron Nano VL": (
        lambda: vision("Nemotron Nano VL"),
        "language_model.backbone.layers.0.mixer.in_proj",
        "language_model.backbone.layers.2.mixer.q_proj",
    ),
    "Qwen3-VL-MoE": (
        qwen3_vl_moe,
        "model.language_model.layers.0.mlp.experts.5.gate_proj",
        "model.visual.blocks.0.attn.qkv",
    ),
    "Gemma 4 with sound": (
        gemma4_vl,
        "model.language_model.layers.0.experts.5.gate_proj",
        "model.audio_tower.layers.0.q_proj",
    ),
}


def logits(folder: Path) -> Tensor:
    kernels = Kernels(available_backends("auto"), "float32", "w4a16")
    found = PagedRunner(load_model(Checkpoint.open(folder), kernels, "float32")).run((0, PROMPT))
    return found[0]


def as_stored(original: tiny.Tensors, plain: tiny.Tensors, turned: bool, alternate: bool) -> tiny.Tensors:
    """The dequantised tensors `plain` where and as `original` keeps them.

    turned     stacks are of transposed matrices
    alternate  gate and up take turns in them
    """
    made = {}
    for name, tensor in original.items():
        if name in plain:
            made[name] = plain[name]
            continue
        prefix, _, leaf = name.rpartition(".")
        kind = "bias" if leaf.endswith("_bias") else "weight"
        experts = []
        for e in range(len(tensor)):
            if leaf.startswith("down_proj"):
                matrix = plain[f"{prefix}.{e}.down_proj.{kind}"]
            else:
                pair = [plain[f"{prefix}.{e}.{half}_proj.{kind}"] for half in ("gate", "up")]
                matrix = torch.stack(pair, dim=1).flatten(0, 1) if alternate else torch.cat(pair)
            experts.append(matrix.t() if turned and kind == "weight" else matrix)
        made[name] = torch.stack(experts).contiguous()
    return made


@pytest.mark.parametrize("name", CASES)
def test_the_result_computes_what_its_dequantised_weights_do_in_the_files_own_layout(tmp_path: Path, name: str) -> None:
    make, packed, kept = CASES[name]
    config, original = make()
    source = tiny.write_plain(tmp_path / "source", config, original, shards=2)
    quantize_checkpoint(source, tmp_path / "out", method="max", progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[f"{packed}.weight"].dtype == torch.uint8
    assert f"{packed}.weight_scale_2" in tensors
    assert tensors[f"{kept}.weight"].dtype == torch.float32
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "modelopt"
    plain: dict[str, Any] = tiny.unpack(tensors)
    again = as_stored(original, plain, turned=name in ("gpt-oss", "Qwen3-VL-MoE"), alternate=name == "gpt-oss")
    for stored, tensor in original.items():
        # a value is at most half a step of 2 off under its block's scale, the largest of the tensor at most 6 of them
        room = float(tensor.abs().max()) / E2M1_MAX * (1 + 2.0**-3)
        assert again[stored].shape == tensor.shape, stored
        assert float((again[stored].float() - tensor.float()).abs().max()) <= room, stored
    # two layers of float32 arithmetic in different summation orders on logits of order 1
    expected = logits(tiny.write_plain(tmp_path / "again", config, again))
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=0, atol=1e-4)
