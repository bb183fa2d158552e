"""KV cache scales under every name they have had, and what is declared without them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import InvalidScaleError, UnsupportedFormatError
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.models import load_model
from tests import tiny

ATTN = "model.layers.0.self_attn"
FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
CT_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def folder(path: Path, scales: dict[str, torch.Tensor], scheme: object = FP8, method: str = "modelopt") -> Path:
    """A plain tiny Llama with these scales under ATTN, and `scheme` as its kv_cache_scheme."""
    section = {"quant_method": method, "kv_cache_scheme": scheme, "ignore": []}
    tiny.tiny_llama(path, tokenizer=False, quantization_config=section)
    stored = load_file(path / "model.safetensors")
    save_file({**stored, **{f"{ATTN}.{name}": t for name, t in scales.items()}}, path / "model.safetensors")
    return path


def scalar(value: float, like: str = "f32 []") -> torch.Tensor:
    dtype, shape = like.split()
    tensor = torch.tensor(value, dtype={"f32": torch.float32, "bf16": torch.bfloat16}[dtype])
    return tensor.reshape(1) if shape == "[1]" else tensor


@pytest.mark.parametrize("like", ["f32 []", "f32 [1]", "bf16 []", "bf16 [1]"])
@pytest.mark.parametrize(
    ("k", "v"),
    [
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
        ("qkv_proj.k_scale", "qkv_proj.v_scale"),
        ("qkqkv_proj.k_scale", "qkqkv_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
    ],
)
def test_every_name_and_shape_is_read(tmp_path, k, v, like):
    ckpt = Checkpoint.open(folder(tmp_path, {k: scalar(0.5, like), v: scalar(0.25, like)}))
    assert ckpt.kv_scales(ATTN) == (0.5, 0.25)
    assert ckpt.notes == ()


@pytest.mark.parametrize("name", ["kv_scale", "attn.kv_scale", "qkv_proj.kv_scale", "k_proj.kv_scale"])
def test_one_scale_for_both_needs_no_note(tmp_path, name):
    ckpt = Checkpoint.open(folder(tmp_path, {name: scalar(0.5)}))
    assert ckpt.kv_scales(ATTN) == (0.5, 0.5)
    assert ckpt.notes == ()


@pytest.mark.parametrize("name", ["k_proj.k_scale", "v_proj.v_scale", "k_scale"])
def test_a_lone_scale_serves_both_and_is_noted(tmp_path, name):
    ckpt = Checkpoint.open(folder(tmp_path, {name: scalar(0.5)}))
    assert ckpt.kv_scales(ATTN) == (0.5, 0.5)
    assert "without its fellow" in ckpt.notes[0]


@pytest.mark.parametrize(
    ("scheme", "method", "scales", "kv_dtype"),
    [
        (FP8, "modelopt", (1.0, 1.0), "fp8"),
        ("FP8", "modelopt", (1.0, 1.0), "fp8"),
        ("NVFP4", "modelopt", (1.0, 1.0), "nvfp4"),
        (CT_FP8, "compressed-tensors", (1.0, 1.0), "fp8"),
        (None, "modelopt", None, "float32"),
    ],
)
def test_what_is_declared_without_scales_means_one_and_chooses_the_cache(tmp_path, scheme, method, scales, kv_dtype):
    ckpt = Checkpoint.open(folder(tmp_path, {}, scheme, method))
    assert ckpt.kv_scales(ATTN) == scales
    assert load_model(ckpt, Kernels([ReferenceBackend()], "float32")).kv_dtype == kv_dtype
    assert ckpt.notes == ()


def test_an_nvfp4_cache_may_be_declared_in_hf_quant_config_alone(tmp_path):
    tiny.tiny_llama(tmp_path, tokenizer=False)
    record = {"quant_algo": None, "kv_cache_quant_algo": "NVFP4"}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": record}))
    assert load_model(Checkpoint.open(tmp_path), Kernels([ReferenceBackend()], "float32")).kv_dtype == "nvfp4"


def test_a_dynamic_scheme_is_noted(tmp_path):
    ckpt = Checkpoint.open(folder(tmp_path, {}, {**CT_FP8, "dynamic": True}, "compressed-tensors"))
    assert "declared dynamic" in ckpt.notes[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5, 0.0])
@pytest.mark.parametrize("name", ["v_scale", "kv_scale"])
def test_an_unusable_scale_is_refused_by_name(tmp_path, name, bad):
    scales = {name: scalar(bad)} | ({"k_scale": scalar(0.5)} if name == "v_scale" else {})
    with pytest.raises(InvalidScaleError, match=name):
        Checkpoint.open(folder(tmp_path, scales)).kv_scales(ATTN)


def test_scales_per_head_and_affine_caches_are_refused(tmp_path):
    heads = folder(tmp_path / "heads", {"k_scale": torch.ones(2, 1, 1), "v_scale": torch.ones(2, 1, 1)})
    with pytest.raises(UnsupportedFormatError, match=r"k_scale .*\[2, 1, 1\].*per head"):
        Checkpoint.open(heads).kv_scales(ATTN)
    affine = folder(tmp_path / "affine", {"k_proj.k_bias": torch.zeros(1)})
    with pytest.raises(UnsupportedFormatError, match="affine"):
        Checkpoint.open(affine).kv_scales(ATTN)


def test_scales_of_attention_in_fp8_are_left_unread(tmp_path):
    scales = {name: scalar(0.5) for name in ("k_scale", "v_scale", "q_scale", "prob_output_scale")}
    load_model(Checkpoint.open(folder(tmp_path, scales)), Kernels([ReferenceBackend()], "float32"))
