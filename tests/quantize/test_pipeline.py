"""Where a source may come from, and what is refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.quantize import default_model
from nvfp4_runtime.quantize.pipeline import quantize_folder
from nvfp4_runtime.quantize.recipes import family_exclusions
from tests import tiny
from tests.checkpoint.test_gguf import CONFIG, write_gguf
from tests.tiny import tiny_llama


def test_a_gguf_file_is_converted_on_the_way_and_nothing_of_it_stays(tmp_path):
    gguf = write_gguf(tmp_path / "model.gguf", tiny.random_tensors(CONFIG))
    report = quantize_folder(gguf, tmp_path / "out", progress=False)
    assert report.algo == "W4A16_NVFP4"
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "out"}
    assert Checkpoint.open(tmp_path / "out").notes == ()


def test_default_means_the_embedded_model(tmp_path, monkeypatch):
    source = tiny_llama(tmp_path / "tiny")
    monkeypatch.setattr(default_model, "default_bf16", lambda progress: source)
    quantize_folder("default", tmp_path / "out", progress=False)
    assert Checkpoint.open(tmp_path / "out").quant.algo == "W4A16_NVFP4"


def test_a_file_whose_matrices_begin_at_odd_addresses_is_read_all_the_same(tmp_path):
    source = tiny_llama(tmp_path / "src")
    quantize_folder(source, tmp_path / "even", progress=False)
    weights = source / "model.safetensors"
    raw = weights.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].rstrip()
    header += b" " * (1 - len(header) % 2)  # an odd length
    weights.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    quantize_folder(source, tmp_path / "odd", progress=False)
    even, odd = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("even", "odd"))
    assert even == odd


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic'; expected one of max, mse, 4over6, awq, gptq"),
        ({"fp8_kv": True}, "needs a calibration text"),
        ({"fp8": ["*.q_proj"]}, "FP8 layers have a measured input_scale"),
        ({"calib_texts": ["a"], "calib_windows": 0}, "at least 1 window"),
    ],
)
def test_impossible_wishes_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        quantize_folder(tiny_llama(tmp_path / "src"), tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


def test_a_gguf_that_is_not_there_is_said(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not a file"):
        quantize_folder(tmp_path / "no.gguf", tmp_path / "out", progress=False)


def test_families_leave_plain_what_nvidia_does():
    hybrid = {"architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": "M-M*-ME*"}
    assert family_exclusions(hybrid) == tuple(f"*.layers.{i}.mixer.*" for i in (2, 3, 7))
    assert family_exclusions({"architectures": ["DeepseekV3ForCausalLM"]}) == ("*.self_attn.*",)
    assert family_exclusions({"architectures": ["LlamaForCausalLM"]}) == ()
    assert family_exclusions({}) == ()
