"""The same defects in compressed-tensors' words, whose scales divide, on what llm-compressor wrote."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from nvfp4_runtime.checkpoint.doctor.repair import inspect_and_repair
from tests.checkpoint.doctor.patients import GATE, UP, Q, alarms, dequantised, edit, edit_json, found

NAMES = ("config.json", "model.safetensors")


@pytest.fixture
def patient(shared, tmp_path):
    """(folder, parent): the fixture, and its dequantised weights as if they were the model it was made of."""
    fixture = shared / "fixtures" / "llmcompressor-llama-nvfp4"
    folder, parent = tmp_path / "ct", tmp_path / "parent"
    folder.mkdir()
    parent.mkdir()
    for name in NAMES:
        shutil.copyfile(fixture / name, folder / name)
    weights = {f"{name}.weight": tensor.contiguous() for name, tensor in dequantised(folder).items()}
    save_file(weights, parent / "model.safetensors")
    return folder, parent


def test_the_fast_decoder_gives_the_tools_own_weights(shared, patient):
    folder, _ = patient
    reference = load_file(
        shared / "fixtures" / "llmcompressor-llama-nvfp4" / "reference" / "dequant_weights.safetensors"
    )
    ours = dequantised(folder)
    assert len(ours) == 14
    for name, weight in ours.items():
        assert torch.equal(weight, reference[f"{name}.weight"])


def test_it_is_sound_and_equal_to_its_own_weights(patient):
    folder, parent = patient
    report = inspect(folder, parent)
    assert report.sound, report.findings
    assert report.parent.sqnr_db == 999
    layer = next(layer for layer in report.layers if layer.name == UP)
    stored = load_file(folder / "model.safetensors")
    assert layer.scales.tensor == pytest.approx(1 / float(stored[f"{UP}.weight_global_scale"]))
    assert layer.scales.input == pytest.approx(1 / float(stored[f"{UP}.input_global_scale"]))


def test_a_multiplier_in_a_divisors_place_is_inverted(patient, tmp_path):
    folder, _ = patient
    before = dequantised(folder)

    def change(tensors):
        tensors[f"{UP}.weight_global_scale"] = 1 / tensors[f"{UP}.weight_global_scale"]
        tensors[f"{GATE}.weight_global_scale"] = 1 / tensors[f"{GATE}.weight_global_scale"]

    edit(folder, change)
    finding = found(inspect(folder), "tensor-scale-inverted")
    assert (finding.severity, set(finding.layers)) == ("error", {UP, GATE})
    assert inspect_and_repair(folder, tmp_path / "out").sound
    after = dequantised(tmp_path / "out")
    assert all(torch.allclose(before[name], after[name], rtol=1e-6, atol=0) for name in before)


def test_divisors_that_differ_are_folded_exactly(patient, tmp_path):
    folder, _ = patient
    edit(folder, lambda tensors: tensors.update({f"{Q}.weight_global_scale": tensors[f"{Q}.weight_global_scale"] * 2}))
    before = dequantised(folder)
    found(inspect(folder), "sibling-scales-differ")
    assert inspect_and_repair(folder, tmp_path / "out").sound
    after = dequantised(tmp_path / "out")
    assert all(torch.equal(before[n].view(torch.int32), after[n].view(torch.int32)) for n in before)


def test_a_missing_divisor_comes_from_the_sibling_and_lost_weights_from_the_parent(patient, tmp_path):
    folder, parent = patient
    original = load_file(folder / "model.safetensors")
    before = dequantised(folder)

    def change(tensors):
        del tensors[f"{UP}.input_global_scale"]
        tensors[f"{Q}.weight_scale"] = torch.full_like(tensors[f"{Q}.weight_scale"].float(), torch.nan).to(
            torch.float8_e4m3fn
        )

    edit(folder, change)
    assert set(alarms(folder)) == {"block-scale-nan", "input-scale-missing"}
    report = inspect_and_repair(folder, tmp_path / "out", parent)
    assert report.sound, report.repair.remaining
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after[f"{UP}.input_global_scale"], original[f"{UP}.input_global_scale"])
    assert torch.equal(after[f"{Q}.weight_global_scale"], original[f"{Q}.weight_global_scale"])  # that of k and v
    weights = dequantised(tmp_path / "out")
    assert torch.allclose(weights[Q], before[Q], rtol=0, atol=float(before[Q].abs().max()) / 12)


def test_an_ignore_list_that_covers_quantised_layers_is_rewritten(patient, tmp_path):
    folder, _ = patient
    edit_json(folder, "config.json", lambda c: c["quantization_config"].update(ignore=["lm_head", "re:.*gate_proj"]))
    assert len(found(inspect(folder), "excluded-but-quantised").layers) == 2
    assert inspect_and_repair(folder, tmp_path / "out").sound
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in ignore
    assert not any("gate" in pattern for pattern in ignore)
