"""Quantising a folder: bit-equal to the restated recipe, in ModelOpt's layout, whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.errors import CheckpointError, ConfigError
from nvfp4_runtime.nvfp4 import block_scales
from nvfp4_runtime.quantize.pipeline import quantize_folder
from nvfp4_runtime.quantize.ptq import quantize_checkpoint
from tests import tiny
from tests.nvfp4 import restated

CONFIG = tiny.llama_config(dtype="bfloat16")
TENSORS = tiny.random_tensors(CONFIG, dtype=torch.bfloat16)
LINEARS = [
    name.removesuffix(".weight")
    for name in TENSORS
    if name.endswith(".weight") and name.removesuffix(".weight").endswith(tiny.LINEARS)
]
INPUT_SCALES = {module: 0.001 * (i + 1) for i, module in enumerate(LINEARS)}
KV_SCALES = {f"model.layers.{i}.self_attn": (0.01 * (i + 1), 0.02) for i in range(2)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write_plain(tmp_path / "src", CONFIG, TENSORS, shards=3)


def test_every_layer_is_bit_equal_to_the_restated_recipe_with_fused_maxima(source, tmp_path):
    report = quantize_checkpoint(source, tmp_path / "out", method="max", progress=False)
    assert (report.algo, report.num_quantized) == ("W4A16_NVFP4", 14)
    out = load_file(tmp_path / "out" / "model.safetensors")
    for layer in range(2):
        for siblings in (["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]):
            parent = "mlp" if siblings[0] in ("gate_proj", "down_proj") else "self_attn"
            modules = [f"model.layers.{layer}.{parent}.{leaf}" for leaf in siblings]
            amax = max(TENSORS[f"{m}.weight"].abs().max().item() for m in modules)
            scale_2 = np.float32(amax) / np.float32(2688)
            for module in modules:
                codes, scale = restated.quantize(TENSORS[f"{module}.weight"].float().numpy(), scale_2)
                assert out[f"{module}.weight_scale_2"].item() == scale_2
                np.testing.assert_array_equal(out[f"{module}.weight_scale"].view(torch.uint8).numpy(), scale)
                np.testing.assert_array_equal(out[f"{module}.weight"].numpy(), restated.pack(codes))
    for name, tensor in TENSORS.items():
        if name.removesuffix(".weight") not in LINEARS:
            assert torch.equal(out[name], tensor), name


def test_the_result_loads_without_a_note_every_tensor_used(source, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(source, out, input_scales=INPUT_SCALES, kv_scales=KV_SCALES, progress=False)
    ckpt = Checkpoint.open(out)
    assert (ckpt.quant.method, ckpt.quant.algo, ckpt.quant.kv_algo) == ("modelopt", "NVFP4", "FP8")
    for name, tensor in TENSORS.items():
        module = name.removesuffix(".weight")
        if tensor.dim() == 2 and "embed" not in name:
            weight = ckpt.linear(module, *tensor.shape)
            assert weight.format == ("nvfp4" if module in LINEARS else "bf16")
        else:
            ckpt.tensor(name, tuple(tensor.shape))
    for attn, scales in KV_SCALES.items():
        assert ckpt.kv_scales(attn) == tuple(np.float32(s) for s in scales)
    ckpt.finish()
    assert ckpt.notes == ()


def test_fused_layers_share_the_largest_input_scale(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out", input_scales=INPUT_SCALES, progress=False)
    out = load_file(tmp_path / "out" / "model.safetensors")
    qkv = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    largest = np.float32(max(INPUT_SCALES[m] for m in qkv))
    assert {out[f"{m}.input_scale"].item() for m in qkv} == {largest}
    down = "model.layers.0.mlp.down_proj"
    assert out[f"{down}.input_scale"].item() == np.float32(INPUT_SCALES[down])


@pytest.mark.parametrize("method", ["mse", "4over6"])
def test_the_searches_are_those_of_the_definition_under_the_shared_tensor_scale(source, tmp_path, method):
    quantize_checkpoint(source, tmp_path / "out", method=method, progress=False)
    out = load_file(tmp_path / "out" / "model.safetensors")
    modules = [f"model.layers.1.mlp.{leaf}_proj" for leaf in ("gate", "up")]
    amax = torch.stack([TENSORS[f"{m}.weight"].abs().max() for m in modules]).max()
    scale_2 = block_scales.tensor_scale(amax, method)
    for module in modules:
        packed, scale = block_scales.quantize(TENSORS[f"{module}.weight"], scale_2, method)
        assert out[f"{module}.weight_scale_2"] == scale_2
        assert torch.equal(out[f"{module}.weight"], packed)
        assert torch.equal(out[f"{module}.weight_scale"].view(torch.uint8), scale.view(torch.uint8))


def test_fp8_layers_make_a_mixed_checkpoint_in_modelopts_words(source, tmp_path):
    out = tmp_path / "out"
    report = quantize_checkpoint(
        source, out, input_scales=INPUT_SCALES, fp8=["*.down_proj", "*.q_proj"], exclude=["*.o_proj"], progress=False
    )
    assert (report.algo, report.num_quantized) == ("MIXED_PRECISION", 12)
    stored = load_file(out / "model.safetensors")
    down, k_proj = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.k_proj"
    weight = TENSORS[f"{down}.weight"].float()
    scale = weight.abs().max() / 448
    assert stored[f"{down}.weight_scale"] == scale
    assert torch.equal(stored[f"{down}.weight"].float(), (weight / scale).to(torch.float8_e4m3fn).float())
    assert stored[f"{down}.input_scale"].item() == pytest.approx(INPUT_SCALES[down] * 6, rel=1e-6)  # amax / 448
    assert stored[f"{k_proj}.weight"].dtype == torch.uint8
    assert stored["model.layers.1.self_attn.o_proj.weight"].dtype == torch.bfloat16
    assert f"{down}.weight_scale_2" not in stored
    record = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert record["quantized_layers"] == section["quantized_layers"]
    assert record["quantized_layers"][down] == {"quant_algo": "FP8"}
    assert record["quantized_layers"][k_proj] == {"quant_algo": "NVFP4", "group_size": 16}
    assert "model.layers.1.self_attn.o_proj" not in record["quantized_layers"]
    assert "exclude_modules" not in record
    assert section["ignore"] == []
    targets = {m for group in section["config_groups"].values() for m in group["targets"]}
    assert targets == set(record["quantized_layers"])


def layout(folder: Path) -> dict[str, tuple[str, int]]:
    """Tensor names (layer numbers and module paths kept) with dtype and rank."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {k: (file.get_slice(k).get_dtype(), len(file.get_slice(k).get_shape())) for k in file.keys()}  # noqa: SIM118 - a safe_open has no iterator


def json_keys(value: object, prefix: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {f"{prefix}:{type(value).__name__}"}
    return set().union(*(json_keys(v, f"{prefix}.{k}") for k, v in value.items()))


def test_names_dtypes_ranks_and_json_keys_equal_modelopts_own_export(shared, source, tmp_path):
    fixture = shared / "fixtures" / "modelopt-llama-nvfp4-kvfp8"
    out = tmp_path / "out"
    quantize_checkpoint(source, out, input_scales=INPUT_SCALES, kv_scales=KV_SCALES, progress=False)
    assert layout(out) == layout(fixture)
    for file, key in (("hf_quant_config.json", None), ("config.json", "quantization_config")):
        ours, theirs = (json.loads((folder / file).read_text()) for folder in (out, fixture))
        assert json_keys(ours[key] if key else ours) == json_keys(theirs[key] if key else theirs)
    record = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert record == json.loads((fixture / "hf_quant_config.json").read_text())["quantization"]


def test_without_input_scales_the_layout_is_weight_only(source, tmp_path):
    out = tmp_path / "out"
    quantize_folder(source, out, progress=False)
    assert not any(name.endswith("input_scale") for name in layout(out))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "W4A16_NVFP4"
    assert "input_activations" not in config["config_groups"]["group_0"]
    assert "kv_cache_scheme" not in config


def test_excluded_layers_stay_bit_for_bit_and_are_listed(source, tmp_path):
    out = tmp_path / "out"
    report = quantize_checkpoint(source, out, exclude=["model.layers.0.self_attn", "*.down_proj"], progress=False)
    assert report.num_quantized == 8
    stored = load_file(out / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(stored[f"{name}.weight"], TENSORS[f"{name}.weight"])
    excluded = json.loads((out / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert {"lm_head", "model.embed_tokens", name, "model.layers.1.mlp.down_proj"} <= set(excluded)
    ckpt = Checkpoint.open(out)
    ckpt.linear(name, 64, 64)
    assert ckpt.notes == ()


def test_layers_whose_k_is_no_multiple_of_16_stay_plain_and_are_reported(tmp_path):
    config = tiny.llama_config(intermediate_size=24)
    source = tiny.write_plain(tmp_path / "src", config, tiny.random_tensors(config))
    report = quantize_checkpoint(source, tmp_path / "out", progress=False)
    assert report.num_quantized == 12
    assert report.notes[0] == ("model.layers.0.mlp.down_proj stays plain: input features (24) no multiple of 16")


def test_an_exclusion_that_matches_nothing_is_reported(source, tmp_path):
    exclude = ["model.layers.0.self_atn*", "lm_head", "*.down_proj"]
    report = quantize_checkpoint(source, tmp_path / "out", exclude=exclude, progress=False)
    assert report.notes == ("the exclusion 'model.layers.0.self_atn*' matches no layer",)


def test_biases_and_head_norms_come_along(tmp_path):
    config = tiny.qwen2_config()
    tensors = tiny.random_tensors(config)
    source = tiny.write_plain(tmp_path / "src", config, tensors)
    quantize_checkpoint(source, tmp_path / "out", progress=False)
    weight = Checkpoint.open(tmp_path / "out").linear("model.layers.0.self_attn.k_proj", 32, 64)
    assert weight.bias is not None
    assert torch.equal(weight.bias, tensors["model.layers.0.self_attn.k_proj.bias"])


def test_small_shards_get_an_index_and_load_the_same(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "one", progress=False)
    quantize_checkpoint(source, tmp_path / "many", progress=False, max_shard_bytes=20_000)
    one, many = Shards(tmp_path / "one"), Shards(tmp_path / "many")
    files = {info.file.name for info in many}
    assert len(files) > 3
    assert all(re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", f) for f in files)
    module = LINEARS[0]
    for name in (f"{module}.weight", f"{module}.weight_scale"):
        a, b = (s.read(name, dtypes=("U8", "F8_E4M3")).view(torch.uint8) for s in (one, many))
        assert torch.equal(a, b)


def test_tokenizer_and_generation_files_travel_and_code_does_not(source, tmp_path):
    (source / "modeling_custom.py").write_text("raise SystemExit")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    quantize_checkpoint(source, tmp_path / "out", progress=False)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "hf_quant_config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    }


def test_an_existing_result_is_never_overwritten(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(ConfigError, match="not an empty folder"):
        quantize_checkpoint(source, out, progress=False)
    assert [p.name for p in out.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic'; expected one of max, mse, 4over6"),
        ({"exclude": ["*"]}, "nothing in .* would be quantised"),
        ({"input_scales": {}}, r"14 layer\(s\) have no input scale"),
        ({"input_scales": {**INPUT_SCALES, LINEARS[3]: 0.0}}, "is 0.0; expected a positive number"),
        ({"input_scales": {**INPUT_SCALES, LINEARS[3]: float("nan")}}, "is nan; expected a positive number"),
    ],
)
def test_impossible_wishes_are_refused_before_anything_is_written(source, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        quantize_checkpoint(source, tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


def test_a_quantised_source_is_refused(tmp_path):
    source = tiny.tiny_nvfp4_llama(tmp_path / "src")
    with pytest.raises(ConfigError, match="is already quantised"):
        quantize_checkpoint(source, tmp_path / "out", progress=False)


def test_fp8_kv_without_a_calibration_text_is_refused(source, tmp_path):
    with pytest.raises(ConfigError, match="needs a calibration text"):
        quantize_folder(source, tmp_path / "out", fp8_kv=True, progress=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_layer_with_nan_or_inf_is_refused_by_name_and_leaves_nothing(tmp_path, bad):
    tensors = {name: t.clone() for name, t in TENSORS.items()}
    tensors[f"{LINEARS[4]}.weight"][3, 5] = bad
    source = tiny.write_plain(tmp_path / "src", CONFIG, tensors)
    with pytest.raises(CheckpointError, match=f"{re.escape(LINEARS[4])}.weight in model.safetensors holds NaN or Inf"):
        quantize_checkpoint(source, tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]
