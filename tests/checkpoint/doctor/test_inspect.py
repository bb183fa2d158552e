"""`nvfp4 inspect`, short form: what is stored, from headers alone."""

from __future__ import annotations

import json

import pytest
import torch
from nvfp4_runtime.checkpoint.inspect import inspect, render
from safetensors.torch import load_file, save_file

from nvfp4_runtime.errors import CheckpointError
from tests import tiny


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
    assert report.notes == ()
    text = render(report)
    assert "model.layers.*.mlp.down_proj" in text
    assert "KV cache: fp8, 128 bytes per token" in text


def test_a_plain_bf16_folder_is_its_own_measure(tmp_path):
    config = tiny.llama_config(tie_word_embeddings=True)
    report = inspect(tiny.write_plain(tmp_path, config, tiny.random_tensors(config, dtype=torch.bfloat16)))
    assert report.ratio_to_bf16 == 1.0
    assert {g.stored for g in report.groups} == {"bf16"}
    assert "declared: not quantised" in render(report)


def test_disagreements_between_configs_and_tensors_are_notes(tmp_path):
    folder = tiny.tiny_nvfp4_llama(tmp_path, tokenizer=False)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    del tensors["model.layers.1.mlp.up_proj.input_scale"]
    save_file(tensors, path)
    record = json.loads((folder / "hf_quant_config.json").read_text())
    record["quantization"]["exclude_modules"] = ["lm_head", "model.embed_tokens", "*.gate_proj"]
    (folder / "hf_quant_config.json").write_text(json.dumps(record))
    notes = inspect(folder).notes
    assert any("config.json and hf_quant_config.json differ in *.gate_proj" in n for n in notes)
    assert any("2 layer(s) are packed NVFP4 although the config excludes them" in n for n in notes)
    assert any("lack weight_scale or weight_scale_2, e.g. model.layers.0.mlp.up_proj" in n for n in notes)
    assert any("have no input_scale" in n and "model.layers.1.mlp.up_proj" in n for n in notes)


def test_a_format_without_a_reader_is_described_and_said_to_be_unservable(shared):
    report = inspect(shared / "fixtures" / "llmcompressor-llama-nvfp4")
    assert report.method == "compressed-tensors"
    assert {g.stored for g in report.groups} == {"bf16", "ct 4-bit"}
    assert any(note.startswith("cannot be served:") for note in report.notes)


def test_no_weight_data_is_read(tmp_path, monkeypatch):
    folder = tiny.tiny_nvfp4_llama(tmp_path, tokenizer=False)

    def refuse(*args, **kwargs):
        raise AssertionError("inspect opened the data")

    monkeypatch.setattr("nvfp4_runtime.checkpoint.shards.safe_open", refuse)
    assert inspect(folder).parameters > 0


def test_a_broken_folder_is_an_error_not_a_report(tmp_path):
    folder = tiny.tiny_llama(tmp_path, tokenizer=False)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        inspect(folder)
