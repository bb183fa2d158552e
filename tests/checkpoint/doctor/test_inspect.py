"""What is stored, in the report and on the screen; configs and indices held against the tensors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from nvfp4_runtime.checkpoint.doctor.render import render
from nvfp4_runtime.checkpoint.doctor.repair import inspect_and_repair
from nvfp4_runtime.errors import CheckpointError
from tests import tiny
from tests.checkpoint.doctor.patients import DOWN, GATE, UP, alarms, dequantised, edit, edit_json, found, sound


def test_a_quantised_folder_is_described_group_by_group(tmp_path):
    config = tiny.llama_config()
    tensors = tiny.random_tensors(config, dtype=torch.bfloat16)
    folder = tiny.write_modelopt(
        tmp_path, config, tensors, exclude=("lm_head", "model.layers.0.self_attn*"), kv_scales=(0.1, 0.1), shards=2
    )
    report = inspect(folder)
    groups = {(g.name, g.stored): g for g in report.groups}
    down = groups["model.layers.*.mlp.down_proj", "nvfp4"]
    # [64, 96] twice: half a byte per weight, a byte per 16, and two FP32 scalars per module
    assert (down.count, down.shape, down.bytes) == (2, (64, 96), 2 * (64 * 48 + 64 * 6 + 8))
    assert down.bits_per_weight == pytest.approx(4.5 + 64 / (64 * 96))
    assert down.excluded is False
    assert down.input_scale
    assert groups["model.layers.*.self_attn.q_proj", "bf16"].excluded is True
    assert groups["model.layers.*.self_attn.q_proj", "nvfp4"].count == 1
    assert report.parameters == sum(t.numel() for t in tensors.values())
    assert report.bytes == sum(report.bytes_by_format.values())
    assert (report.kv_dtype, report.kv_bytes_per_token) == ("fp8", 2 * 2 * 2 * 16)
    assert report.files == 2
    assert [f.id for f in report.findings] == ["input-scale-constant", "unseen-without-parent"]
    text = render(report)
    assert "model.layers.*.mlp.down_proj" in text
    assert "KV cache: fp8, 128 bytes per token" in text


def test_a_plain_bf16_folder_is_its_own_measure(tmp_path):
    config = tiny.llama_config(tie_word_embeddings=True)
    report = inspect(tiny.write_plain(tmp_path, config, tiny.random_tensors(config, dtype=torch.bfloat16)))
    assert report.ratio_to_bf16 == 1.0
    assert {g.stored for g in report.groups} == {"bf16"}
    assert "declared: not quantised" in render(report)


@pytest.mark.parametrize("name", ["modelopt-llama-nvfp4-excluded", "modelopt-llama-nvfp4-kvfp8"])
def test_what_modelopt_wrote_is_sound(shared, name):
    assert alarms(shared / "fixtures" / name) == []


def test_what_llm_compressor_wrote_has_nothing_wrong_in_its_tensors(shared):
    report = inspect(shared / "fixtures" / "llmcompressor-llama-nvfp4")
    assert report.method == "compressed-tensors"
    assert {g.stored for g in report.groups} == {"bf16", "nvfp4"}
    assert {f.id for f in report.findings if f.severity == "error"} <= {"format-unsupported"}


def test_a_broken_folder_is_an_error_not_a_report(tmp_path):
    folder = tiny.tiny_llama(tmp_path, tokenizer=False)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        inspect(folder)


def test_every_layer_says_how_it_is_stored_and_why(tmp_path):
    config = tiny.llama_config()
    tensors = tiny.random_tensors(config, dtype=torch.bfloat16)
    folder = tiny.write_modelopt(tmp_path, config, tensors, exclude=("lm_head", "model.layers.0.self_attn*"))
    layers = {layer.name: layer for layer in inspect(folder).layers}
    assert layers["lm_head"].why == "excluded by 'lm_head'"
    assert layers["model.layers.0.self_attn.q_proj"].why == "excluded by 'model.layers.0.self_attn*'"
    up = layers[UP]
    assert (up.stored, up.shape, up.excluded, up.why) == ("nvfp4", (96, 64), False, "declared NVFP4")
    assert up.bits_per_weight == pytest.approx(4.5 + 64 / (96 * 64), abs=1e-4)
    stored = load_file(folder / "model.safetensors")
    assert up.scales.block_min == float(stored[f"{UP}.weight_scale"].float().min())
    assert up.scales.block_max == float(stored[f"{UP}.weight_scale"].float().max())
    assert up.scales.tensor == pytest.approx(float(stored[f"{UP}.weight_scale_2"]))
    assert up.scales.input == pytest.approx(0.01)


def test_memory_is_divided_into_weights_and_tokens(tmp_path):
    folder = tiny.tiny_nvfp4_llama(tmp_path, kv_scales=(0.1, 0.1), tokenizer=False)
    size = inspect(folder).bytes
    small, exact, large = inspect(folder, memories=(size - 1, size, size + 1280)).fits
    assert (small.weights_fit, small.kv_tokens) == (False, 0)
    assert (exact.weights_fit, exact.kv_tokens) == (True, 0)
    assert (large.weights_fit, large.kv_tokens) == (True, 10)  # 128 bytes per token


def test_contradicting_configs_are_findings_and_repaired_to_what_the_tensors_say(tmp_path):
    folder, _ = sound(tmp_path)
    edit_json(folder, "hf_quant_config.json", lambda c: c["quantization"].update(exclude_modules=["*.gate_proj"]))
    report = inspect(folder)
    assert "differ in *.gate_proj" in found(report, "config-disagreement").message
    assert set(found(report, "excluded-but-quantised").layers) == {GATE, GATE.replace("0", "1")}
    before = dequantised(folder)
    repaired = inspect_and_repair(folder, tmp_path / "out")
    assert repaired.sound, repaired.repair.remaining
    record = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert record["exclude_modules"] == section["ignore"]
    assert set(section["ignore"]) == {"lm_head", "model.embed_tokens"}
    assert all(torch.equal(t, dequantised(tmp_path / "out")[name]) for name, t in before.items())


def test_two_words_for_the_algorithm_become_one(tmp_path):
    folder, _ = sound(tmp_path)
    edit_json(folder, "config.json", lambda c: c["quantization_config"].update(quant_algo="W4A16_NVFP4"))
    assert "NVFP4" in found(inspect(folder), "config-disagreement").message
    assert inspect_and_repair(folder, tmp_path / "out").sound
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["quant_algo"] == "NVFP4"  # every layer has an input_scale


def test_a_plain_layer_that_is_declared_quantised_is_excluded_by_name(tmp_path):
    config = tiny.llama_config()
    tensors = tiny.random_tensors(config, dtype=torch.bfloat16)
    folder = tiny.write_modelopt(
        tmp_path / "in", config, tensors, exclude=("lm_head", "model.embed_tokens", UP), input_scale=None
    )
    edit_json(folder, "config.json", lambda c: c["quantization_config"]["ignore"].remove(UP))
    edit_json(folder, "hf_quant_config.json", lambda c: c["quantization"]["exclude_modules"].remove(UP))
    finding = found(inspect(folder), "declared-but-plain")
    assert (finding.severity, finding.layers) == ("warning", (UP,))
    assert inspect_and_repair(folder, tmp_path / "out").sound
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (section["quant_algo"], UP in section["ignore"]) == ("W4A16_NVFP4", True)


def test_quantised_layers_that_nothing_declares_get_their_declaration(tmp_path):
    folder, _ = sound(tmp_path)
    edit_json(folder, "config.json", lambda c: c.pop("quantization_config"))
    (folder / "hf_quant_config.json").unlink()
    finding = found(inspect(folder), "quantised-undeclared")
    assert (finding.severity, len(finding.layers)) == ("warning", 14)
    assert inspect_and_repair(folder, tmp_path / "out").sound
    assert inspect(tmp_path / "out").algo == "NVFP4"


def test_an_algorithm_without_a_reader_is_named(tmp_path):
    folder, _ = sound(tmp_path)
    for name, section, key in (
        ("config.json", "quantization_config", "quant_algo"),
        ("hf_quant_config.json", "quantization", "quant_algo"),
    ):
        edit_json(folder, name, lambda c, section=section, key=key: c[section].update({key: "NVFP4_SVD"}))
    finding = found(inspect(folder), "format-unsupported")
    assert finding.severity == "error"
    assert "NVFP4_SVD" in finding.message


def test_a_folder_without_config_is_looked_at_all_the_same(tmp_path):
    folder, _ = sound(tmp_path)
    (folder / "config.json").unlink()
    report = inspect(folder)
    assert found(report, "config-missing").severity == "error"
    assert len(report.layers) > 14


def test_orphans_missing_layers_and_heads_are_found(tmp_path):
    folder, _ = sound(tmp_path)

    def change(tensors):
        del tensors["lm_head.weight"]
        del tensors[f"{UP}.weight"]
        tensors["model.layers.7.input_layernorm.weight"] = torch.ones(64, dtype=torch.bfloat16)

    edit(folder, change)
    edit_json(folder, "config.json", lambda c: c.update(num_hidden_layers=3))
    report = inspect(folder)
    assert found(report, "head-missing").severity == "error"
    assert found(report, "layer-missing").layers == ("layers.2",)
    assert found(report, "layer-unexpected").layers == ("layers.7",)
    assert found(report, "tensor-missing").layers == (UP,)
    assert found(report, "tensor-missing").severity == "error"
    repaired = inspect_and_repair(folder, tmp_path / "out")
    assert "tensor-missing" in [f.id for f in repaired.repair.remaining]
    assert f"{UP}.weight_scale" in load_file(tmp_path / "out" / "model.safetensors")


def test_an_input_scale_of_nothing_is_an_orphan_and_left_out_of_the_copy(tmp_path):
    folder, _ = sound(tmp_path)
    edit(folder, lambda tensors: tensors.update({"model.ghost.input_scale": torch.tensor(0.1)}))
    assert found(inspect(folder), "orphan-tensor").severity == "warning"
    repaired = inspect_and_repair(folder, tmp_path / "out")
    assert repaired.sound
    assert "model.ghost.input_scale" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_tensor_of_no_known_spelling_is_mentioned(tmp_path):
    folder, _ = sound(tmp_path)
    edit(folder, lambda tensors: tensors.update({"model.layers.0.mixer.A_log": torch.zeros(4)}))
    report = inspect(folder)
    assert report.sound
    assert found(report, "tensor-loose").layers == ("model.layers.0.mixer.A_log",)


def test_a_head_that_is_tied_and_stored_is_told_apart_from_a_copy(tmp_path):
    folder, _ = sound(tmp_path)
    edit_json(folder, "config.json", lambda c: c.update(tie_word_embeddings=True))
    assert found(inspect(folder), "head-tied-and-stored").severity == "warning"
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert found(inspect(folder), "head-tied-and-stored").severity == "info"


def test_a_layer_without_its_scales_cannot_be_read_and_comes_back_from_the_parent(tmp_path):
    folder, parent = sound(tmp_path)
    before = dequantised(folder)
    edit(folder, lambda tensors: tensors.pop(f"{DOWN}.weight_scale"))
    report = inspect(folder)
    finding = found(report, "layer-unreadable")
    assert (finding.severity, finding.layers) == ("error", (DOWN,))
    assert next(layer for layer in report.layers if layer.name == DOWN).stored == "incomplete nvfp4"
    assert inspect_and_repair(folder, tmp_path / "out", parent).sound
    after = dequantised(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_table_shows_groups_totals_and_findings(tmp_path):
    folder, parent = sound(tmp_path)
    edit(folder, lambda tensors: tensors.pop(f"{DOWN}.input_scale"))
    text = render(inspect(folder, parent))
    assert "\x1b" not in text
    assert "warning: input-scale-missing: 1 layer(s) have no input_scale" in text
    assert "remedy: calibrate again" in text
    assert "worst first" in text
    assert "not sound: 0 error(s), 1 warning(s)" in text
    assert "model.layers.1.mlp.gate_proj  " not in render(inspect(folder))
    assert "model.layers.1.mlp.gate_proj  " in render(inspect(folder), every_layer=True)
    assert "\x1b[33;1m" in render(inspect(folder), colour=True)
