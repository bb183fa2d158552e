"""Bytes in another order: what is certain is an error and repaired, what is only likely is said to be so."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from nvfp4_runtime.checkpoint.doctor.repair import inspect_and_repair
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.layouts import swizzle_scales
from tests.checkpoint.doctor.patients import UP, Q, alarms, dequantised, edit, found, sound

WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 16, "num_key_value_heads": 8}


def swizzle_all(tensors):
    """As a kernel keeps them: in the same shape where that is whole tiles."""
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            tensors[name] = swizzle_scales(tensor).reshape(tensor.shape)


def swap_all(tensors):
    for name, tensor in tensors.items():
        if tensor.dtype == torch.uint8:
            tensors[name] = (tensor >> 4) | (tensor << 4)


def assert_repaired_to(before, folder):
    after = dequantised(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_scales_swizzled_in_place_are_likely_without_and_certain_with_the_parent(tmp_path):
    folder, parent = sound(tmp_path, **WIDE)
    before = dequantised(folder)
    edit(folder, swizzle_all)
    likely = found(inspect(folder), "scales-swizzled")
    assert likely.severity == "warning"
    assert len(likely.layers) == 14
    without = inspect_and_repair(folder, tmp_path / "without")
    assert [f.id for f in without.repair.remaining] == ["scales-swizzled"]  # likely is not enough to change weights
    certain = found(inspect(folder, parent), "scales-swizzled")
    assert (certain.severity, len(certain.layers)) == ("error", 14)
    assert inspect_and_repair(folder, tmp_path / "out", parent).sound
    assert_repaired_to(before, tmp_path / "out")


def test_scales_padded_to_whole_tiles_are_certain_by_their_shape(tmp_path):
    folder, _ = sound(tmp_path)
    before = dequantised(folder)

    def change(tensors):
        tensors[f"{UP}.weight_scale"] = swizzle_scales(tensors[f"{UP}.weight_scale"]).reshape(128, 4)
        tensors[f"{Q}.weight_scale"] = swizzle_scales(tensors[f"{Q}.weight_scale"])  # flat

    edit(folder, change)
    finding = found(inspect(folder), "scales-swizzled")
    assert (finding.severity, set(finding.layers)) == ("error", {UP, Q})
    assert inspect_and_repair(folder, tmp_path / "out").sound
    assert_repaired_to(before, tmp_path / "out")


def test_swapped_nibbles_need_the_parent_to_be_seen(tmp_path):
    folder, parent = sound(tmp_path)
    before = dequantised(folder)
    edit(folder, swap_all)
    blind = inspect(folder)
    assert blind.sound
    assert "nibbles" in found(blind, "unseen-without-parent").message
    finding = found(inspect(folder, parent), "nibbles-swapped")
    assert (finding.severity, len(finding.layers)) == ("error", 14)
    assert inspect_and_repair(folder, tmp_path / "out", parent).sound
    assert_repaired_to(before, tmp_path / "out")


def test_scales_packed_once_more_are_an_error_without_cure(tmp_path):
    folder, _ = sound(tmp_path)

    def change(tensors):
        tensors[f"{UP}.weight_scale_double_scale"] = torch.ones(4)

    edit(folder, change)
    assert found(inspect(folder), "double-scale").severity == "error"
    assert "double-scale" in [f.id for f in inspect_and_repair(folder, tmp_path / "out").repair.remaining]


def test_another_model_is_far_from_the_parent(tmp_path):
    folder, parent = sound(tmp_path)

    def change(tensors):
        tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].flip(0)
        tensors[f"{UP}.weight_scale"] = (
            tensors[f"{UP}.weight_scale"].view(torch.uint8).flip(0).view(torch.float8_e4m3fn)
        )

    edit(folder, change)
    assert alarms(folder) == []
    finding = found(inspect(folder, parent), "far-from-parent")
    assert (finding.severity, finding.layers) == ("warning", (UP,))


def test_factors_folded_into_a_weight_are_told_from_another_model(tmp_path):
    folder, parent = sound(tmp_path)
    generator = torch.Generator().manual_seed(3)
    rows, columns = (torch.exp2(2 * torch.randn(n, generator=generator)) for n in (96, 64))

    def change(tensors):
        original = load_file(parent / "model.safetensors")[f"{UP}.weight"].float()
        folded = original * rows.unsqueeze(1) * columns
        scale_2 = codec.weight_scale_2(folded.abs().max())
        tensors[f"{UP}.weight"], tensors[f"{UP}.weight_scale"] = codec.quantize(folded, scale_2)
        tensors[f"{UP}.weight_scale_2"] = scale_2

    edit(folder, change)
    report = inspect(folder, parent)
    assert "far-from-parent" not in [f.id for f in report.findings]
    finding = found(report, "factors-folded")
    assert (finding.severity, finding.layers) == ("info", (UP,))
    assert next(layer.sqnr_db for layer in report.layers if layer.name == UP) < 10


def test_half_of_the_scales_gone_is_an_error(tmp_path):
    folder, _ = sound(tmp_path)

    def change(tensors):
        for name, tensor in tensors.items():
            if name.endswith("weight_scale"):
                tensors[name] = tensor[:, ::2].contiguous()

    edit(folder, change)
    finding = found(inspect(folder), "block-scale-halved")
    assert (finding.severity, len(finding.layers)) == ("error", 14)
