"""Checkpoint: fixtures bit for bit, both dialects to one answer, and hostile layers refused with the reason."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import (
    CheckpointError,
    InvalidScaleError,
    MissingTensorError,
    TensorShapeError,
    UnexpectedTensorError,
)
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight
from tests import tiny

MODULE = "model.layers.1.mlp.down_proj"  # [64, 96] in the tiny Llama
N, K = 64, 96
FIXTURE_SHAPES = {
    "q_proj": (128, 128),
    "k_proj": (64, 128),
    "v_proj": (64, 128),
    "o_proj": (128, 128),
    "gate_proj": (256, 128),
    "up_proj": (256, 128),
    "down_proj": (128, 256),
    "lm_head": (512, 128),
}


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a single-file checkpoint."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


def edit_json(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return tiny.tiny_nvfp4_llama(tmp_path / "packed", tokenizer=False)


@pytest.mark.parametrize(
    ("name", "plain", "kv"),
    [
        (
            "modelopt-llama-nvfp4-kvfp8",
            {"lm_head"},
            [(0.0087890625, 0.00537109375), (0.008684431202709675, 0.0057198661379516125)],
        ),
        (
            "modelopt-llama-nvfp4-excluded",
            {"lm_head", "model.layers.1.mlp.down_proj", *(f"model.layers.0.self_attn.{p}_proj" for p in "qkvo")},
            [None, None],
        ),
    ],
)
def test_fixture_dequantises_bit_for_bit_and_every_tensor_is_used(shared, name, plain, kv):
    folder = shared / "fixtures" / name
    reference = load_file(folder / "reference" / "dequant_weights.safetensors")
    stored = load_file(folder / "model.safetensors")
    ckpt = Checkpoint.open(folder)
    assert (ckpt.quant.method, ckpt.quant.algo) == ("modelopt", "NVFP4")
    for tensor in list(ckpt.names()):
        module, leaf = tensor.removesuffix(".weight"), tensor.removesuffix(".weight").rpartition(".")[2]
        if tensor.endswith(".weight") and leaf in FIXTURE_SHAPES:
            weight = ckpt.linear(module, *FIXTURE_SHAPES[leaf])
            if module in plain:
                assert isinstance(weight, DenseWeight)
                assert torch.equal(weight.weight, stored[tensor])
            else:
                assert isinstance(weight, NVFP4Weight)
                assert torch.equal(weight.dequantize(), reference.pop(tensor))
                assert weight.input_scale == stored[f"{module}.input_scale"].item()
        elif tensor.endswith("norm.weight") or "embed_tokens" in tensor:
            ckpt.tensor(tensor)
    assert not reference
    assert [ckpt.kv_scales(f"model.layers.{i}.self_attn") for i in range(2)] == kv
    ckpt.finish()
    assert ckpt.notes == ()


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_one_model_saved_in_shards_loads_to_one_answer(tmp_path, shards):
    config = tiny.qwen2_config()
    tensors = tiny.random_tensors(config)
    once = Checkpoint.open(tiny.write_modelopt(tmp_path / "once", config, tensors))
    split = Checkpoint.open(tiny.write_modelopt(tmp_path / "split", config, tensors, shards=shards))
    a, b = once.linear(MODULE, N, K), split.linear(MODULE, N, K)
    assert torch.equal(a.dequantize(), b.dequantize())
    q = split.linear("model.layers.0.self_attn.q_proj", 64, 64)
    assert q.bias is not None
    assert torch.equal(q.bias, tensors["model.layers.0.self_attn.q_proj.bias"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain_checkpoints_keep_their_dtype(tmp_path, dtype):
    config = tiny.llama_config()
    tensors = tiny.random_tensors(config, dtype=dtype)
    ckpt = Checkpoint.open(tiny.write_plain(tmp_path, config, tensors))
    weight = ckpt.linear(MODULE, N, K)
    assert isinstance(weight, DenseWeight)
    assert torch.equal(weight.weight, tensors[f"{MODULE}.weight"])
    assert ckpt.quant.method == "none"
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    assert ckpt.nbytes_by_format() == {name: sum(t.nbytes for t in tensors.values())}


def test_scalars_of_shape_1_and_in_bf16_are_read_like_0d_ones(packed):
    stored = load_file(packed / "model.safetensors")
    expected = Checkpoint.open(packed).linear(MODULE, N, K)
    rewrite(
        packed,
        {
            f"{MODULE}.weight_scale_2": stored[f"{MODULE}.weight_scale_2"].reshape(1),
            f"{MODULE}.input_scale": torch.tensor([0.25], dtype=torch.bfloat16),
        },
    )
    weight = Checkpoint.open(packed).linear(MODULE, N, K)
    assert torch.equal(weight.dequantize(), expected.dequantize())
    assert weight.input_scale == 0.25


def test_weight_only_checkpoints_have_no_input_scale_and_no_note(tmp_path):
    config = tiny.llama_config()
    ckpt = Checkpoint.open(tiny.write_modelopt(tmp_path, config, tiny.random_tensors(config), input_scale=None))
    assert ckpt.quant.algo == "W4A16_NVFP4"
    assert ckpt.linear(MODULE, N, K).input_scale is None
    assert ckpt.notes == ()


def test_bytes_by_format_count_codes_and_scales_together(packed):
    ckpt = Checkpoint.open(packed)
    stored = load_file(packed / "model.safetensors")
    scales = ("weight_scale", "weight_scale_2", "input_scale")
    nvfp4 = sum(t.nbytes for n, t in stored.items() if t.dtype == torch.uint8 or n.endswith(scales))
    assert ckpt.nbytes_by_format() == {"nvfp4": nvfp4, "fp32": sum(t.nbytes for t in stored.values()) - nvfp4}


def test_declared_fp8_kv_without_scales_means_one(tmp_path):
    folder = tiny.tiny_nvfp4_llama(tmp_path, kv_scales=(0.5, 0.25), tokenizer=False)
    attn = "model.layers.0.self_attn"
    assert Checkpoint.open(folder).kv_scales(attn) == (0.5, 0.25)
    rewrite(folder, {f"{attn}.k_proj.k_scale": None, f"{attn}.v_proj.v_scale": None})
    assert Checkpoint.open(folder).kv_scales(attn) == (1.0, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5, 0.0])
def test_an_unusable_kv_scale_is_refused(tmp_path, bad):
    folder = tiny.tiny_nvfp4_llama(tmp_path, kv_scales=(0.5, bad), tokenizer=False)
    with pytest.raises(InvalidScaleError, match=r"v_proj\.v_scale"):
        Checkpoint.open(folder).kv_scales("model.layers.0.self_attn")


def test_undeclared_kv_scales_are_noted_and_kept_for_who_asks_for_fp8(packed):
    attn = "model.layers.0.self_attn"
    rewrite(packed, {f"{attn}.k_proj.k_scale": torch.tensor(0.5), f"{attn}.v_proj.v_scale": torch.tensor(0.5)})
    ckpt = Checkpoint.open(packed)
    assert ckpt.kv_scales(attn) == (0.5, 0.5)
    assert "no FP8 KV cache is declared" in ckpt.notes[0]


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_2"])
def test_a_missing_scale_is_refused_by_name(packed, scale):
    rewrite(packed, {f"{MODULE}.{scale}": None})
    with pytest.raises(MissingTensorError, match=rf"down_proj\.{scale}' is missing .* meaningless without its scales"):
        Checkpoint.open(packed).linear(MODULE, N, K)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("scale", ["weight_scale_2", "input_scale"])
def test_a_nan_infinite_or_negative_tensor_scale_is_refused(packed, scale, bad):
    rewrite(packed, {f"{MODULE}.{scale}": torch.tensor(bad)})
    with pytest.raises(InvalidScaleError, match=rf"down_proj\.{scale}' in model.safetensors holds {bad}"):
        Checkpoint.open(packed).linear(MODULE, N, K)


@pytest.mark.parametrize(("byte", "found"), [(0x7F, "NaN in 1 of 384"), (0xFF, "NaN"), (0x81, "1 negative values")])
def test_a_nan_or_negative_block_scale_is_refused(packed, byte, found):
    scale = load_file(packed / "model.safetensors")[f"{MODULE}.weight_scale"].view(torch.uint8).clone()
    scale[3, 2] = byte
    rewrite(packed, {f"{MODULE}.weight_scale": scale.view(torch.float8_e4m3fn)})
    with pytest.raises(InvalidScaleError, match=found):
        Checkpoint.open(packed).linear(MODULE, N, K)


def test_every_other_block_scale_byte_is_accepted(packed):
    scale = torch.tensor([*range(0x7F), 0x80], dtype=torch.uint8).repeat(3).reshape(N, K // 16)
    rewrite(packed, {f"{MODULE}.weight_scale": scale.view(torch.float8_e4m3fn)})
    assert torch.isfinite(Checkpoint.open(packed).linear(MODULE, N, K).dequantize()).all()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight", torch.zeros(N, K, dtype=torch.uint8), r"expected U8 \[64, 48\], found U8 \[64, 96\]"),
        ("weight", torch.zeros(K, N // 2, dtype=torch.uint8), r"found U8 \[96, 32\]"),
        (
            "weight",
            torch.zeros(N, K // 2, dtype=torch.int32),
            r"expected U8 \(NVFP4, MXFP4\), F8_E4M3, BF16.*found I32",
        ),
        ("weight", torch.zeros(N, K), r"expected U8, since .*weight_scale .* is there"),
        ("weight_scale", torch.ones(N, K // 16), r"expected F8_E4M3 \[64, 6\], found F32"),
        ("weight_scale", torch.zeros(6, N, dtype=torch.uint8).view(torch.float8_e4m3fn), r"found F8_E4M3 \[6, 64\]"),
        ("weight_scale_2", torch.ones(2), r"expected one value, \[\] or \[1\], found F32 \[2\]"),
        ("weight_scale_2", torch.ones(1, dtype=torch.int32), r"expected BF16 or F16 or F32, found I32"),
        ("bias", torch.ones(N + 1), r"down_proj\.bias.*\[64\], found F32 \[65\]"),
    ],
)
def test_a_misshapen_or_mistyped_tensor_names_file_expected_and_found(packed, name, tensor, message):
    rewrite(packed, {f"{MODULE}.{name}": tensor})
    with pytest.raises(TensorShapeError, match=message) as raised:
        Checkpoint.open(packed).linear(MODULE, N, K)
    assert raised.value.file == "model.safetensors"


def test_k_that_is_no_multiple_of_16_is_refused(packed):
    rewrite(packed, {f"{MODULE}.weight": torch.zeros(N, 12, dtype=torch.uint8)})
    with pytest.raises(TensorShapeError, match="multiples of 16, as NVFP4 needs, found 24"):
        Checkpoint.open(packed).linear(MODULE, N, 24)


def test_a_plain_tensor_that_is_packed_is_refused(packed):
    rewrite(packed, {"model.norm.weight": torch.zeros(64, dtype=torch.uint8)})
    with pytest.raises(TensorShapeError, match="expected BF16 or F16 or F32"):
        Checkpoint.open(packed).tensor("model.norm.weight", (64,))


def test_a_missing_tensor_suggests_the_nearest_name(packed):
    with pytest.raises(MissingTensorError, match=r"nearest name there is 'model\.embed_tokens\.weight'"):
        Checkpoint.open(packed).tensor("model.embed_token.weight")


def test_an_extra_tensor_is_refused_unless_excused(packed):
    rewrite(packed, {"model.layers.7.extra": torch.ones(1), "rope.inv_freq": torch.ones(1)})
    ckpt = Checkpoint.open(packed)
    for name in list(ckpt.names()):
        if name.endswith(".weight") and "proj" in name:
            module = name.removesuffix(".weight")
            n, half = load_file(packed / "model.safetensors")[name].shape
            ckpt.linear(module, n, 2 * half)
        elif name.startswith(("model.embed", "lm_head")) or "norm" in name:
            ckpt.tensor(name)
    ckpt.excuse("rope.*", "computed from config.json")
    with pytest.raises(UnexpectedTensorError) as raised:
        ckpt.finish()
    assert raised.value.tensors == ("model.layers.7.extra (model.safetensors)",)
    ckpt.excuse("*.extra", "for this test")
    ckpt.finish()


def test_tensors_decide_and_disagreements_are_noted_and_logged_once_per_kind(packed, caplog):
    record = json.loads((packed / "hf_quant_config.json").read_text())
    record["quantization"]["exclude_modules"].append("model.layers.1.mlp*")
    (packed / "hf_quant_config.json").write_text(json.dumps(record))
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.layers.1.mlp*")
    (packed / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        ckpt = Checkpoint.open(packed)
        assert isinstance(ckpt.linear(MODULE, N, K), NVFP4Weight)
        assert isinstance(ckpt.linear("model.layers.1.mlp.up_proj", 96, 64), NVFP4Weight)
    assert ckpt.notes == (
        "2 layer(s) are packed NVFP4 although the config excludes them, e.g. model.layers.1.mlp.down_proj",
    )
    assert len(caplog.records) == 1


def test_packed_tensors_without_any_declaration_load_and_are_noted(packed):
    (packed / "hf_quant_config.json").unlink()
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (packed / "config.json").write_text(json.dumps(config))
    ckpt = Checkpoint.open(packed)
    assert isinstance(ckpt.linear(MODULE, N, K), NVFP4Weight)
    assert "no config declares it" in ckpt.notes[0]


def test_a_plain_layer_that_is_declared_quantised_loads_and_is_noted(packed):
    rewrite(
        packed,
        {f"{MODULE}.{name}": None for name in ("weight_scale", "weight_scale_2", "input_scale")}
        | {f"{MODULE}.weight": torch.zeros(N, K)},
    )
    ckpt = Checkpoint.open(packed)
    assert isinstance(ckpt.linear(MODULE, N, K), DenseWeight)
    assert "are plain although the config declares NVFP4" in ckpt.notes[0]


@pytest.mark.parametrize("change", [None, torch.tensor(0.0)])
def test_an_absent_or_zero_input_scale_leaves_weight_only_and_is_noted(packed, change):
    rewrite(packed, {f"{MODULE}.input_scale": change})
    ckpt = Checkpoint.open(packed)
    assert ckpt.linear(MODULE, N, K).input_scale is None
    assert "W4A4 is impossible" in ckpt.notes[0]


def test_folders_that_are_no_models_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint.open(tmp_path)


def test_code_in_the_folder_never_runs(tmp_path):
    folder = tiny.tiny_llama(tmp_path / "trap", tokenizer=False)
    (folder / "modeling_trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_trap.Trap"}, trust_remote_code=True)
    Checkpoint.open(folder).linear(MODULE, N, K)
    assert not (tmp_path / "sprung").exists()
