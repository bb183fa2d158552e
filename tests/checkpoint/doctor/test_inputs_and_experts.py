"""Activation scales that are missing, broken or made up; experts that calibration never reached."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from nvfp4_runtime.checkpoint.doctor.repair import inspect_and_repair
from tests import tiny
from tests.checkpoint.doctor.patients import DOWN, UP, alarms, dequantised, edit, edit_json, found, sound

EXPERT = "model.layers.1.mlp.experts.2"


def without(*names):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


def put(name, value):
    def change(tensors):
        tensors[name] = torch.full_like(tensors[name], value)

    return change


@pytest.mark.parametrize(
    ("id", "severity", "change"),
    [
        ("input-scale-missing", "warning", without(f"{UP}.input_scale")),
        ("input-scale-invalid", "error", put(f"{UP}.input_scale", math.nan)),
        ("input-scale-invalid", "error", put(f"{UP}.input_scale", 0.0)),
        ("input-scale-invalid", "error", put(f"{UP}.input_scale", -0.1)),
    ],
)
def test_a_sibling_lends_its_input_scale(tmp_path, id, severity, change):
    folder, _ = sound(tmp_path)
    before = load_file(folder / "model.safetensors")
    edit(folder, change)
    finding = found(inspect(folder), id)
    assert (finding.severity, finding.layers) == (severity, (UP,))
    report = inspect_and_repair(folder, tmp_path / "out")
    assert report.sound, report.repair.remaining
    assert "which read the same input" in report.repair.changes[0].what
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert float(after[f"{UP}.input_scale"]) == float(before[f"{UP}.input_scale"])


def test_an_input_scale_without_sibling_stays_missing(tmp_path):
    folder, _ = sound(tmp_path)
    edit(folder, without(f"{DOWN}.input_scale"))
    report = inspect_and_repair(folder, tmp_path / "out")
    assert [f.id for f in report.repair.remaining] == ["input-scale-missing"]
    assert report.repair.changes == ()


def test_one_input_scale_for_all_layers_was_never_measured(tmp_path):
    folder, _ = sound(tmp_path)

    def change(tensors):
        for name in tensors:
            if name.endswith("input_scale"):
                tensors[name] = torch.tensor(1.0)

    edit(folder, change)
    finding = found(inspect(folder), "input-scale-constant")
    assert (finding.severity, len(finding.layers)) == ("warning", 14)
    assert "the input_scale 1," in finding.message


def test_reciprocal_input_scales_beside_reciprocal_tensor_scales_are_both_inverted(tmp_path):
    folder, _ = sound(tmp_path)

    def change(tensors):
        for name in tensors:
            if name.endswith("weight_scale_2"):
                tensors[name] = 1 / tensors[name]
            if name.endswith("input_scale"):
                tensors[name] = 1 / (tensors[name] / 10)

    edit(folder, change)
    found(inspect(folder), "input-scale-inverted")
    assert inspect_and_repair(folder, tmp_path / "out").sound
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert float(after[f"{UP}.input_scale"]) == pytest.approx(0.0012)


def test_kv_scales_must_be_positive_and_come_in_pairs(tmp_path):
    config = tiny.llama_config()
    tensors = tiny.random_tensors(config)
    folder = tiny.write_modelopt(tmp_path / "kv", config, tensors, kv_scales=(0.1, 0.2), tokenizer=False)
    edit(folder, put("model.layers.0.self_attn.k_proj.k_scale", math.inf))
    edit(folder, without("model.layers.1.self_attn.v_proj.v_scale"))
    report = inspect(folder)
    assert found(report, "kv-scale-invalid").layers == ("model.layers.0.self_attn.k_proj.k_scale",)
    assert found(report, "kv-scale-partial").layers == ("model.layers.1.self_attn.k_proj.k_scale",)
    edit_json(folder, "config.json", lambda c: c["quantization_config"].pop("kv_cache_scheme"))
    edit_json(folder, "hf_quant_config.json", lambda c: c["quantization"].update(kv_cache_quant_algo=None))
    assert found(inspect(folder), "kv-scale-undeclared").severity == "info"


def test_a_sound_mixture_of_experts_has_no_alarms(tmp_path):
    folder, parent = sound(tmp_path, experts=True)
    assert alarms(folder, parent) == []
    assert len(inspect(folder).layers) > 2 * 4 * 3


@pytest.mark.parametrize(
    "change",
    [
        without(f"{EXPERT}.up_proj.input_scale"),
        put(f"{EXPERT}.up_proj.input_scale", 0.0),
        put(f"{EXPERT}.up_proj.input_scale", math.nan),
    ],
)
def test_an_expert_without_input_scale_gets_the_largest_of_the_others(tmp_path, change):
    folder, _ = sound(tmp_path, experts=True)
    edit(folder, put("model.layers.1.mlp.experts.0.up_proj.input_scale", 0.5))
    edit(folder, change)
    before = dequantised(folder)
    finding = found(inspect(folder), "expert-uninitialised")
    assert (finding.severity, finding.layers) == ("error", (f"{EXPERT}.up_proj",))
    report = inspect_and_repair(folder, tmp_path / "out")
    assert report.sound, report.repair.remaining
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert float(after[f"{EXPERT}.up_proj.input_scale"]) == 0.5
    weights = dequantised(tmp_path / "out")
    assert all(torch.equal(before[name], weights[name]) for name in before)


@pytest.mark.parametrize(
    "change",
    [
        without(f"{EXPERT}.up_proj.weight_scale_2"),
        without(f"{EXPERT}.up_proj.weight_scale"),
        put(f"{EXPERT}.up_proj.weight_scale_2", 0.0),
        put(f"{EXPERT}.up_proj.weight", 0),
    ],
)
def test_an_expert_without_weights_is_quantised_again_from_the_parent(tmp_path, change):
    folder, parent = sound(tmp_path, experts=True)
    before = dequantised(folder)
    edit(folder, change)
    assert found(inspect(folder), "expert-uninitialised").layers == (f"{EXPERT}.up_proj",)
    assert "expert-uninitialised" in [f.id for f in inspect_and_repair(folder, tmp_path / "no").repair.remaining]
    report = inspect_and_repair(folder, tmp_path / "out", parent)
    assert report.sound, report.repair.remaining
    after = dequantised(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_missing_expert_is_an_error(tmp_path):
    folder, _ = sound(tmp_path, experts=True)

    def change(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.0.mlp.experts.3.")]:
            del tensors[name]

    edit(folder, change)
    assert len(found(inspect(folder), "expert-missing").layers) == 3
    edit_json(folder, "config.json", lambda config: config.pop("num_experts"))
    assert len(found(inspect(folder), "expert-missing").layers) == 3  # other layers have four
