"""Two JSON files, several spellings, one QuantConfig; contradictions noted, unreadable formats refused by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.checkpoint.declared import declared_algos
from nvfp4_runtime.checkpoint.detect import check_readable, detect, is_excluded, read_config
from nvfp4_runtime.checkpoint.patterns import Patterns
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


def ct_group(**weights: Any) -> dict[str, Any]:
    base = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    return {"targets": ["Linear"], "weights": {**base, **weights}, "input_activations": {"dynamic": "local"}}


def ct(**changes: Any) -> dict[str, Any]:
    base = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head"]}
    return {**base, "version": "0.19.0", "sparsity_config": {}, "transform_config": {}, **changes}


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
        ({"quant_method": "gptq", "bits": 4}, "'gptq'.*nvfp4 quantize"),
        ({"quant_method": "quark"}, "'quark'"),
        ({"quant_method": "torchao"}, "'torchao'"),
        ({"quant_method": "fp_quant"}, "'fp_quant'"),
        (section(quant_algo="W4A16_AWQ"), "ModelOpt's W4A16_AWQ"),
        (section(quant_algo="NVFP4_SVD"), "ModelOpt's NVFP4_SVD"),
        (section(quant_algo="MXFP8"), "ModelOpt's MXFP8"),
        (section(kv_cache_scheme="NVFP4_AFFINE"), "a NVFP4_AFFINE KV cache"),
        (section(kv_cache_scheme={"num_bits": 8, "type": "int"}), "a INT 8-BIT KV cache"),
        (section(config_groups={"g": {"weights": {"group_size": 32}}}), "group_size 32"),
        (ct(transform_config={"config_groups": {"R1": {"type": "hadamard"}}}), "transform_config .*R1.*rotations"),
        (ct(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config .sparse-24-bitmask"),
        (ct(format="pack-quantized"), "format 'pack-quantized'"),
        (ct(config_groups={"g": ct_group(num_bits=4, type="int")}), "compressed-tensors's INT4"),
        (ct(kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "attn_head"}), r"FP8 \(attn_head scales\)"),
        (ct(kv_cache_scheme={"num_bits": 4, "type": "float"}), "a FLOAT 4-BIT KV cache"),
    ],
)
def test_formats_without_a_reader_are_refused_naming_what_was_found(tmp_path, config, named):
    folder = tiny.tiny_llama(tmp_path / "m", tokenizer=False)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    with pytest.raises(UnsupportedFormatError, match=named):
        Checkpoint.open(folder)


def test_an_mlx_folder_is_refused_by_name(tmp_path):
    """MLX declares itself in a section of its own name."""
    tiny.tiny_llama(tmp_path, tokenizer=False, quantization={"group_size": 16, "bits": 4, "mode": "nvfp4"})
    with pytest.raises(UnsupportedFormatError, match="'mlx'"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig(),
        QuantConfig("modelopt", "W4A16_NVFP4"),
        QuantConfig("modelopt"),
        QuantConfig("modelopt", "W4A8_NVFP4_FP8", 32),
        QuantConfig("modelopt", "NVFP4_AWQ", kv_algo="NVFP4"),
        QuantConfig("modelopt", "MIXED_PRECISION"),
        QuantConfig("modelopt", "FP8_PB_REAL"),
        QuantConfig("compressed-tensors", "NVFP4", kv_algo="FP8"),
        QuantConfig("fp8", "FP8"),
        QuantConfig("mxfp4", "MXFP4"),
    ],
)
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


@pytest.mark.parametrize(
    ("groups", "algo", "layers"),
    [
        ({"g": ct_group()}, "NVFP4", (("Linear", "NVFP4"),)),
        ({"g": {**ct_group(), "input_activations": None}}, "W4A16_NVFP4", (("Linear", "W4A16_NVFP4"),)),
        ({"g": ct_group(group_size=32)}, "MXFP4", (("Linear", "MXFP4"),)),
        ({"g": ct_group(num_bits=8)}, "FP8", (("Linear", "FP8"),)),
        ({"NVFP4A16": ["Linear"]}, "W4A16_NVFP4", (("Linear", "W4A16_NVFP4"),)),
        (
            {"a": {**ct_group(), "targets": ["re:.*mlp.*"]}, "b": {**ct_group(num_bits=8), "targets": ["a.b"]}},
            "MIXED_PRECISION",
            (("re:.*mlp.*", "NVFP4"), ("a.b", "FP8")),
        ),
        ({"g": {"targets": ["Linear"], "weights": None}}, None, ()),
    ],
)
def test_compressed_tensors_groups_in_modelopt_s_words(tmp_path, groups, algo, layers):
    quant = folder_with(tmp_path, ct(config_groups=groups))
    assert (quant.method, quant.algo, quant.layers) == ("compressed-tensors", algo, layers)
    assert (quant.exclude, quant.producer, quant.notes) == (("lm_head",), "compressed-tensors 0.19.0", ())


def test_a_foreign_hf_quant_config_is_noted(tmp_path):
    quant = folder_with(tmp_path, ct(config_groups={"g": ct_group()}), record())
    assert quant.method == "compressed-tensors"
    assert "took the latter" in quant.notes[0]


def test_quantized_layers_come_from_either_file_and_contradictions_are_noted(tmp_path):
    layers = {"a.b": {"quant_algo": "nvfp4", "group_size": 16}, "a.c": {"quant_algo": "FP8"}}
    found = (("a.b", "NVFP4"), ("a.c", "FP8"))
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    assert folder_with(tmp_path, section(**mixed)).layers == found
    both = folder_with(tmp_path, section(**mixed, ignore=[]), record(**mixed, exclude_modules=[]))
    assert (both.layers, both.notes) == (found, ())
    other = folder_with(tmp_path, section(**mixed), record(**{**mixed, "quantized_layers": {"a.b": layers["a.c"]}}))
    assert other.layers == (("a.b", "FP8"),)
    assert "differ in a.b, a.c" in other.notes[0]
    assert "without quantized_layers" in folder_with(tmp_path, section(quant_algo="MIXED_PRECISION"), {}).notes[0]


@pytest.mark.parametrize(
    ("method", "extra", "algos"),
    [
        ("fp8", {"weight_block_size": [128, 128]}, {"FP8"}),
        ("fp8", {"moe_quant_algo": "NVFP4"}, {"FP8", "NVFP4"}),
        ("mxfp4", {}, {"MXFP4"}),
    ],
)
def test_deepseek_and_gpt_oss_sections(tmp_path, method, extra, algos):
    quant = folder_with(tmp_path, {"quant_method": method, "modules_to_not_convert": ["lm_head"], **extra})
    assert declared_algos(quant, "model.layers.0.mlp.down_proj") == algos
    assert declared_algos(quant, "lm_head") == set()


def test_the_section_may_lie_in_text_config_or_bear_its_old_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": section()}}))
    assert detect(tmp_path, read_config(tmp_path)).algo == "NVFP4"
    (tmp_path / "config.json").write_text(json.dumps({"compression_config": ct(config_groups={"g": ct_group()})}))
    assert detect(tmp_path, read_config(tmp_path)).algo == "NVFP4"


MIXED = QuantConfig(
    "modelopt",
    "MIXED_PRECISION",
    layers=(("model.layers.0.mlp.experts", "NVFP4"), ("model.layers.0.mlp.up_proj", "FP8")),
)
OVERLAP = QuantConfig(
    "compressed-tensors",
    "MIXED_PRECISION",
    exclude=("re:.*router", "lm_head"),
    layers=(("re:.*mlp.*", "NVFP4"), ("re:.*layers.1.mlp.up_proj", "FP8"), ("Linear", "W4A16_NVFP4")),
)


@pytest.mark.parametrize(
    ("quant", "module", "algos"),
    [
        (MIXED, "model.layers.0.mlp.experts.7.up_proj", {"NVFP4"}),
        (MIXED, "model.layers.0.mlp.up_proj", {"FP8"}),
        (MIXED, "model.layers.0.self_attn.q_proj", set()),
        (OVERLAP, "model.layers.1.mlp.up_proj", {"NVFP4", "FP8"}),  # groups do overlap in published files
        (OVERLAP, "model.layers.0.self_attn.q_proj", {"W4A16_NVFP4"}),
        (OVERLAP, "model.layers.0.router", set()),
        (
            QuantConfig("modelopt", "NVFP4", exclude=("model.layers.0.self_attn.qkv_proj",)),
            "model.layers.0.self_attn.k_proj",
            set(),
        ),
        (
            QuantConfig("modelopt", "NVFP4", exclude=("model.language_model.layers.0*",)),
            "model.layers.0.mlp.up_proj",
            set(),
        ),
        (
            QuantConfig("modelopt", "NVFP4", exclude=("language_model.model.layers.1",)),
            "model.layers.10.mlp.up_proj",
            {"NVFP4"},
        ),
        (QuantConfig("modelopt", "NVFP4", exclude=("language_model.lm_head",)), "lm_head", set()),
    ],
)
def test_what_is_declared_for_one_module(quant, module, algos):
    assert declared_algos(quant, module) == algos


@pytest.mark.parametrize(
    ("pattern", "evaluated"),
    [
        ("re:.*mlp.experts.*.(gate|up|down)_proj$", True),
        (r"re:model\.layers\.(5[6-9]|6[0-3])\.mlp.*", True),
        ("re:^(?!.*lm_head).*$", True),
        ("re:(a+)+$", False),  # exponential time
        ("re:(a|a)*$", False),
        ("re:a?a?a?a?a?a?a?a?aaaaaaaa", False),
        ("re:.*.*.*.*.*.*x", False),
        ("re:a{1000000000}", False),
        (r"re:(a)\1", False),
        ("re:(", False),
        ("re:" + "a" * 5000, False),
        ("*a*a*a*a*a*a*a*a*b", False),
        ("model.layers.*.mlp*", True),
    ],
)
def test_only_patterns_that_cannot_run_away_are_evaluated(pattern, evaluated):
    patterns = Patterns([pattern])
    assert patterns.unevaluated == ([] if evaluated else [pattern])
    started = time.perf_counter()
    patterns.match("a" * 100_000)
    patterns.match("a" * 250 + "!")
    assert time.perf_counter() - started < 2


def test_a_pattern_that_is_not_evaluated_is_noted(tmp_path):
    tiny.tiny_llama(tmp_path, tokenizer=False)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = section(ignore=["re:(a+)+$"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "too costly to evaluate" in Checkpoint.open(tmp_path).notes[0]
