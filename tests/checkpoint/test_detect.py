"""Two JSON files, several spellings, one QuantConfig; contradictions noted, unreadable formats refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.checkpoint.detect import check_readable, detect, is_excluded, read_config
from nvfp4_runtime.config import QuantConfig
from nvfp4_runtime.errors import CheckpointError, UnsupportedFormatError
from tests import tiny

FP8_KV = {"dynamic": False, "num_bits": 8, "type": "float"}


def folder_with(tmp_path: Path, section: Any = None, record: Any = None) -> QuantConfig:
    config: dict[str, Any] = {"model_type": "llama"}
    if section is not None:
        config["quantization_config"] = section
    (tmp_path / "config.json").write_text(json.dumps(config))
    if record is not None:
        producer = {"name": "modelopt", "version": "0.35.1.dev0+gabc"}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": producer, "quantization": record}))
    return detect(tmp_path, read_config(tmp_path))


def section(**changes: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": 4, "group_size": 16}, "targets": ["Linear"]}
    base = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "config_groups": {"g": group}}
    return {**base, **changes}


def record(**changes: Any) -> dict[str, Any]:
    base = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
    return {**base, **changes}


def test_neither_file_declares_anything(tmp_path):
    assert folder_with(tmp_path) == QuantConfig()


def test_an_old_export_has_only_hf_quant_config(tmp_path):
    quant = folder_with(tmp_path, None, record(quant_algo="nvfp4", kv_cache_quant_algo="FP8"))
    assert quant == QuantConfig("modelopt", "NVFP4", 16, "FP8", ("lm_head",), "modelopt 0.35.1.dev0+gabc")


def test_config_json_alone_is_enough(tmp_path):
    quant = folder_with(tmp_path, section(kv_cache_scheme=FP8_KV, producer={"name": "modelopt", "version": "0.47.0"}))
    assert quant == QuantConfig("modelopt", "NVFP4", 16, "FP8", ("lm_head",), "modelopt 0.47.0")


def test_both_files_that_agree_leave_no_note(tmp_path):
    quant = folder_with(tmp_path, section(kv_cache_scheme=FP8_KV), record(kv_cache_quant_algo="FP8"))
    assert quant.notes == ()
    assert quant.kv_algo == "FP8"


@pytest.mark.parametrize(
    ("config", "hf", "field", "value", "note"),
    [
        ({"quant_algo": "FP8"}, {}, "algo", "NVFP4", "algorithm: config.json says FP8"),
        ({"kv_cache_scheme": FP8_KV}, {}, "kv_algo", None, "KV cache: config.json says FP8"),
        ({}, {"exclude_modules": ["lm_head", "a.b"]}, "exclude", ("lm_head", "a.b"), "differ in a.b"),
        ({}, {"group_size": 32}, "group_size", 32, r"give [16, 32]"),
    ],
)
def test_a_contradiction_is_noted_and_the_fuller_record_taken(tmp_path, config, hf, field, value, note):
    quant = folder_with(tmp_path, section(**config), record(**hf))
    assert getattr(quant, field) == value
    assert len(quant.notes) == 1
    assert note in quant.notes[0]


def test_what_only_one_file_says_is_taken_without_a_note(tmp_path):
    """Imitations of hf_quant_config.json leave keys out, and old config.json files have no kv_cache_scheme."""
    quant = folder_with(tmp_path, section(kv_cache_scheme=FP8_KV), {"exclude_modules": ["lm_head"]})
    assert (quant.algo, quant.kv_algo, quant.group_size, quant.notes) == ("NVFP4", "FP8", 16, ())
    quant = folder_with(tmp_path, section(), record(kv_cache_quant_algo="FP8"))
    assert (quant.kv_algo, quant.notes) == ("FP8", ())


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "'compressed-tensors'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "'fp8'"),
        (section(quant_algo="FP8"), "ModelOpt's FP8"),
        (section(quant_algo="NVFP4_AWQ"), "ModelOpt's NVFP4_AWQ"),
        (section(quant_algo="MIXED_PRECISION"), "ModelOpt's MIXED_PRECISION"),
        (section(kv_cache_scheme="NVFP4"), "a NVFP4 KV cache"),
        (section(config_groups={"g": {"weights": {"group_size": 32}}}), "group_size 32"),
    ],
)
def test_formats_without_a_reader_are_refused_naming_what_was_found(tmp_path, config, named):
    folder = tiny.tiny_llama(tmp_path / "m", tokenizer=False)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    with pytest.raises(UnsupportedFormatError, match=named):
        Checkpoint.open(folder)


@pytest.mark.parametrize("quant", [QuantConfig(), QuantConfig("modelopt", "W4A16_NVFP4"), QuantConfig("modelopt")])
def test_what_has_a_reader_is_not_refused(quant):
    check_readable(quant, Path("x"))


@pytest.mark.parametrize("value", ["modelopt", [1], 3])
def test_a_quantisation_section_that_is_no_object_is_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match="expected an object"):
        folder_with(tmp_path, value)


@pytest.mark.parametrize("value", ["lm_head", [1], {"a": 1}])
def test_an_exclusion_list_that_is_no_list_of_names_is_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match="is not a list of module names"):
        folder_with(tmp_path, section(ignore=value))


def test_odd_values_in_unimportant_places_do_not_break_reading(tmp_path):
    quant = folder_with(
        tmp_path, section(config_groups=[1], producer="me", kv_cache_scheme=None), record(group_size=None)
    )
    assert (quant.group_size, quant.kv_algo) == (16, None)


@pytest.mark.parametrize(
    ("module", "excluded"),
    [
        ("lm_head", True),
        ("model.layers.0.self_attn.q_proj", True),
        ("model.layers.1.self_attn.q_proj", False),
        ("model.layers.10.mlp.up_proj", False),  # model.layers.1 is another layer
        ("model.layers.2.mlp.up_proj", True),
        ("lm_head_extra", False),
    ],
)
def test_exclusions_are_patterns_or_containers_never_substrings(module, excluded):
    assert is_excluded(module, ("lm_head", "model.layers.0.self_attn*", "model.layers.1", "model.layers.2")) is (
        excluded or module.startswith("model.layers.1.")
    )
