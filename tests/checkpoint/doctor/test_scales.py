"""Broken scales are found, and with the parent the layers are quantised again."""

from __future__ import annotations

import math

import pytest
import torch

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from nvfp4_runtime.checkpoint.doctor.repair import inspect_and_repair
from tests.checkpoint.doctor.patients import DOWN, GATE, UP, Q, alarms, dequantised, edit, found, sound


def put_bytes(name, value, count=3):
    def change(tensors):
        raw = tensors[name].view(torch.uint8).clone()
        raw.reshape(-1)[:count] = value
        tensors[name] = raw.view(torch.float8_e4m3fn)

    return change


def put(name, value):
    def change(tensors):
        tensors[name] = torch.full_like(tensors[name], value)

    return change


def test_a_sound_checkpoint_has_no_alarms_with_and_without_parent(tmp_path):
    folder, parent = sound(tmp_path)
    assert alarms(folder) == []
    assert alarms(folder, parent) == []
    assert inspect(folder).sound


@pytest.mark.parametrize(
    ("id", "change"),
    [
        ("block-scale-nan", put_bytes(f"{UP}.weight_scale", 0x7F)),
        ("block-scale-nan", put_bytes(f"{UP}.weight_scale", 0xFF)),
        ("block-scale-negative", put_bytes(f"{UP}.weight_scale", 0xB8)),
        ("block-scale-zero", put_bytes(f"{UP}.weight_scale", 0x00, count=20)),
        ("tensor-scale-invalid", put(f"{UP}.weight_scale_2", math.nan)),
        ("tensor-scale-invalid", put(f"{UP}.weight_scale_2", math.inf)),
        ("tensor-scale-invalid", put(f"{UP}.weight_scale_2", 0.0)),
        ("tensor-scale-invalid", put(f"{UP}.weight_scale_2", -1e-4)),
    ],
)
def test_broken_scales_are_errors_and_need_the_parent(tmp_path, id, change):
    folder, parent = sound(tmp_path)
    before = dequantised(folder)
    edit(folder, change)
    finding = found(inspect(folder), id)
    assert (finding.severity, finding.layers) == ("error", (UP,))
    without = inspect_and_repair(folder, tmp_path / "without", None)
    assert not without.sound
    assert id in [f.id for f in without.repair.remaining]
    report = inspect_and_repair(folder, tmp_path / "out", parent)
    assert report.sound, report.repair.remaining
    assert [(c.finding, c.layer, c.exact) for c in report.repair.changes] == [(id, UP, False)]
    after = dequantised(tmp_path / "out")
    # quantised anew by `max` with its sibling's tensor scale: what the sound checkpoint held
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert alarms(tmp_path / "out", parent) == []
    served = Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(served.linear(name, *w.shape).dequantize(), w) for name, w in before.items())


@pytest.mark.parametrize(
    ("name", "word"), [("model.norm.weight", "model.norm.weight is not"), (f"{DOWN}.weight", "dB from the parent's")]
)
def test_lost_layers_are_not_taken_from_another_model(tmp_path, name, word):
    folder, parent = sound(tmp_path)
    edit(folder, put_bytes(f"{UP}.weight_scale", 0x7F))
    edit(parent, lambda tensors: tensors.update({name: tensors[name].roll(1, 0)}))
    report = inspect_and_repair(folder, tmp_path / "out", parent)
    refusal = next(f for f in report.repair.remaining if f.id == "parent-untrusted")
    assert word in refusal.message
    assert "block-scale-nan" in [f.id for f in report.repair.remaining]
    assert report.repair.changes == ()


def test_the_report_counts_broken_scales(tmp_path):
    folder, _ = sound(tmp_path)
    edit(folder, put_bytes(f"{UP}.weight_scale", 0x7F, count=7))
    assert "7 in all, most (7 of 384)" in found(inspect(folder), "block-scale-nan").message


def test_a_few_zero_scales_are_written_as_zeros_with_the_same_values(tmp_path):
    folder, _ = sound(tmp_path)
    edit(folder, put_bytes(f"{UP}.weight_scale", 0x00, count=3))
    before = dequantised(folder)
    finding = found(inspect(folder), "block-scale-zero")
    assert (finding.severity, finding.layers) == ("warning", (UP,))
    assert inspect_and_repair(folder, tmp_path / "out").sound
    after = dequantised(tmp_path / "out")
    assert all(torch.equal(before[n].view(torch.int32), after[n].view(torch.int32)) for n in before)


def test_a_zero_tensor_scale_over_zero_weights_is_what_max_gives(tmp_path):
    folder, _ = sound(tmp_path)

    def change(tensors):
        tensors[f"{DOWN}.weight"].zero_()
        tensors[f"{DOWN}.weight_scale_2"].zero_()

    edit(folder, change)
    assert alarms(folder) == ["weights-zero"]


def test_a_reciprocal_tensor_scale_is_inverted_back(tmp_path):
    folder, parent = sound(tmp_path)
    before = dequantised(folder)

    def change(tensors):
        for name in tensors:
            if name.endswith("weight_scale_2"):
                tensors[name] = 1 / tensors[name]

    edit(folder, change)
    finding = found(inspect(folder), "tensor-scale-inverted")
    assert finding.severity == "error"
    assert len(finding.layers) == 14
    for name, given in (("alone", None), ("with parent", parent)):
        assert inspect_and_repair(folder, tmp_path / name, given).sound
        after = dequantised(tmp_path / name)
        assert all(torch.allclose(before[n], after[n], rtol=1e-6, atol=0) for n in before)  # 1/(1/x) may lose one bit


def test_a_tensor_scale_far_too_small_clips_and_is_said(tmp_path):
    folder, _ = sound(tmp_path)

    def change(tensors):
        tensors[f"{DOWN}.weight_scale"] = torch.full_like(tensors[f"{DOWN}.weight_scale"].float(), 448).to(
            torch.float8_e4m3fn
        )
        tensors[f"{DOWN}.weight"].fill_(0x77)

    edit(folder, change)
    finding = found(inspect(folder), "blocks-saturated")
    assert (finding.severity, finding.layers) == ("warning", (DOWN,))


def test_a_nan_in_a_plain_weight_is_an_error(tmp_path):
    folder, _ = sound(tmp_path)

    def change(tensors):
        tensors["model.norm.weight"][3] = math.nan
        tensors["lm_head.weight"][5, 5] = math.inf

    edit(folder, change)
    assert set(found(inspect(folder), "plain-nonfinite").layers) == {"model.norm", "lm_head"}


def test_siblings_that_differ_by_a_power_of_two_are_folded_exactly(tmp_path):
    folder, _ = sound(tmp_path)

    def change(tensors):
        tensors[f"{Q}.weight_scale_2"] = tensors[f"{Q}.weight_scale_2"] / 4

    edit(folder, change)
    before = dequantised(folder)
    finding = found(inspect(folder), "sibling-scales-differ")
    assert finding.severity == "warning"
    assert "by up to a factor of 4" in finding.message
    report = inspect_and_repair(folder, tmp_path / "out")
    assert report.sound, report.repair.remaining
    assert all(change.exact for change in report.repair.changes)
    after = dequantised(tmp_path / "out")
    assert all(torch.equal(before[n].view(torch.int32), after[n].view(torch.int32)) for n in before)


def test_siblings_that_cannot_be_folded_exactly_keep_their_scales(tmp_path):
    folder, _ = sound(tmp_path)

    def change(tensors):
        tensors[f"{GATE}.weight_scale_2"] = tensors[f"{GATE}.weight_scale_2"] * 1.3

    edit(folder, change)
    before = dequantised(folder)
    report = inspect_and_repair(folder, tmp_path / "out")
    assert [f.id for f in report.repair.remaining] == ["sibling-scales-differ"]
    after = dequantised(tmp_path / "out")
    assert all(torch.equal(before[n], after[n]) for n in before)
