"""FP8, MXFP4, stacks of experts and mixed files: counted, compared and checked as NVFP4 is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from nvfp4_runtime.nvfp4 import codec, mx
from tests.checkpoint.doctor.patients import found

PREFIX = "model.layers.0.mlp"


def folder_of(path: Path, tensors: dict[str, Tensor], algos: dict[str, str] | None = None) -> Path:
    """A folder of these tensors; `algos` are declared as a mixed ModelOpt checkpoint."""
    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    if algos is not None:
        layers = {name: {"quant_algo": algo} for name, algo in algos.items()}
        config["quantization_config"] = {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": layers,
        }
    (path / "config.json").write_text(json.dumps(config))
    return path


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def fp8(name: str, w: Tensor) -> dict[str, Tensor]:
    scale = w.float().abs().max() / 448
    return {f"{name}.weight": (w.float() / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}


def nvfp4(name: str, w: Tensor, input_scale: float | None = None) -> dict[str, Tensor]:
    scale_2 = codec.weight_scale_2(w.abs().max())
    packed, block = codec.quantize(w, scale_2)
    tensors = {f"{name}.weight": packed, f"{name}.weight_scale": block, f"{name}.weight_scale_2": scale_2}
    return tensors if input_scale is None else tensors | {f"{name}.input_scale": torch.tensor(input_scale)}


def mixed(path: Path) -> tuple[Path, Path]:
    up, down = random(64, 32, seed=1), random(32, 64, seed=2)
    weights = {f"{PREFIX}.up_proj.weight": up, f"{PREFIX}.down_proj.weight": down}
    tensors = nvfp4(f"{PREFIX}.up_proj", up) | fp8(f"{PREFIX}.down_proj", down)
    algos = {f"{PREFIX}.up_proj": "W4A16_NVFP4", f"{PREFIX}.down_proj": "FP8"}
    return folder_of(path / "mixed", tensors, algos), folder_of(path / "parent", weights)


def change(folder: Path, name: str, value: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = value
    save_file(tensors, folder / "model.safetensors")


def test_a_mixed_file_is_sound_and_each_layer_measured(tmp_path):
    folder, parent = mixed(tmp_path)
    report = inspect(folder, parent)
    assert report.sound, report.findings
    layers = {layer.name.rpartition(".")[2]: layer for layer in report.layers}
    assert (layers["up_proj"].stored, layers["up_proj"].why) == ("nvfp4", "declared W4A16_NVFP4")
    assert (layers["down_proj"].stored, layers["down_proj"].why) == ("fp8", "declared FP8")
    assert layers["down_proj"].sqnr_db > 30 > layers["up_proj"].sqnr_db > 18
    assert layers["down_proj"].bits_per_weight == pytest.approx(8 + 32 / (32 * 64))


def test_a_layer_declared_as_something_else_is_said(tmp_path):
    tensors = nvfp4(f"{PREFIX}.up_proj", random(64, 32))
    folder = folder_of(tmp_path / "other", tensors, {f"{PREFIX}.up_proj": "FP8"})
    finding = found(inspect(folder), "declared-otherwise")
    assert (finding.severity, finding.layers) == ("warning", (f"{PREFIX}.up_proj",))


@pytest.mark.parametrize("value", [0.0, math.nan, -1.0, math.inf])
def test_a_broken_fp8_scale_is_an_error(tmp_path, value):
    folder, _ = mixed(tmp_path)
    change(folder, f"{PREFIX}.down_proj.weight_scale", torch.tensor(value))
    assert found(inspect(folder), "fp8-scale-invalid").layers == (f"{PREFIX}.down_proj",)


def test_a_nan_among_fp8_codes_is_an_error(tmp_path):
    folder, _ = mixed(tmp_path)
    change(folder, f"{PREFIX}.down_proj.weight", torch.full((32, 64), math.nan).to(torch.float8_e4m3fn))
    assert "2,048 of 2,048" in found(inspect(folder), "fp8-nan").message


def test_a_nan_among_e8m0_scales_is_an_error(tmp_path):
    packed, scale = mx.quantize(random(64, 64))
    scale[3, 1] = 255
    tensors = {f"{PREFIX}.up_proj.weight": packed, f"{PREFIX}.up_proj.weight_scale": scale}
    folder = folder_of(tmp_path / "mx", tensors, {f"{PREFIX}.up_proj": "MXFP4"})
    report = inspect(folder)
    assert report.layers[0].stored == "mxfp4"
    assert found(report, "block-scale-nan").layers == (f"{PREFIX}.up_proj",)


def test_a_stack_of_experts_is_counted_and_compared_expert_by_expert(tmp_path):
    name, experts = f"{PREFIX}.experts.down_proj", 3
    w = random(experts, 64, 32)
    parts = [nvfp4("e", w[e]) for e in range(experts)]
    scales = torch.stack([part["e.weight_scale"].view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    tensors = {
        name: torch.stack([part["e.weight"] for part in parts]),
        f"{name}_weight_scale": scales,
        f"{name}_weight_scale_2": torch.stack([part["e.weight_scale_2"] for part in parts]),
    }
    folder = folder_of(tmp_path / "stack", tensors, {f"{PREFIX}.experts": "W4A16_NVFP4"})
    report = inspect(folder, folder_of(tmp_path / "parent", {name: w}))
    assert report.sound, report.findings
    (layer,) = report.layers
    assert (layer.stored, layer.shape, layer.parameters) == ("nvfp4", (3, 64, 32), w.numel())
    decoded = [codec.dequantize(p["e.weight"], p["e.weight_scale"], p["e.weight_scale_2"]) for p in parts]
    noise = float((torch.stack(decoded).double() - w.double()).square().sum())
    assert layer.relative_error == pytest.approx(math.sqrt(noise / float(w.double().square().sum())), rel=1e-5)


def test_an_input_scale_of_exactly_one_is_a_placeholder(tmp_path):
    tensors = nvfp4(f"{PREFIX}.up_proj", random(64, 32), 1.0) | nvfp4(f"{PREFIX}.down_proj", random(32, 64), 0.01)
    folder = folder_of(tmp_path / "one", tensors, {f"{PREFIX}.{leaf}_proj": "NVFP4" for leaf in ("up", "down")})
    finding = found(inspect(folder), "input-scale-constant")
    assert (finding.severity, finding.layers) == ("warning", (f"{PREFIX}.up_proj",))


def test_a_pattern_that_could_run_for_ever_is_not_run(tmp_path):
    tensors = nvfp4(f"{PREFIX}.up_proj", random(64, 32))
    folder = folder_of(tmp_path / "regex", tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": ["re:(a+)+$"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert found(inspect(folder), "pattern-unevaluated").severity == "info"
