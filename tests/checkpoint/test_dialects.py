"""One model in every dialect: dequantised weights bit for bit, logits, notes; and llm-compressor's own file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import TensorShapeError
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.models import load_model
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight
from tests import dialects
from tests.models.paged import PagedRunner

MODEL = dialects.tiny_model()
DIALECTS = dialects.dialects(MODEL)
TOKENS = list(range(1, 24))
# What is worth a note, by dialect; every other one is silent.
NOTES = {
    "modelopt nvfp4, declared by nobody": "packed NVFP4 although no config declares it",
    "modelopt w4a16 with input_scale left": "input_scale although W4A16_NVFP4 declares none",
    "modelopt w4a8": "they run W4A16, their activations are not rounded to FP8",
}


def effective(weight: Weight) -> Tensor:
    """What multiplies the layer's input, fp32."""
    if isinstance(weight, DenseWeight):
        return weight.weight.float()
    if isinstance(weight, NVFP4Weight) and weight.pre_quant_scale is not None:
        return weight.dequantize() * weight.pre_quant_scale
    return weight.dequantize()


def logits(ckpt: Checkpoint) -> Tensor:
    model = load_model(ckpt, Kernels([ReferenceBackend()], "float32", "w4a16"))
    return PagedRunner(model).run((0, TOKENS))[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return logits(Checkpoint.open(DIALECTS["plain fp32"].save(tmp_path_factory.mktemp("d") / "m", MODEL)))


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_loads_to_one_answer(tmp_path: Path, name: str, expected: Tensor) -> None:
    folder = DIALECTS[name].save(tmp_path / "m", MODEL)
    ckpt = Checkpoint.open(folder)
    for module, matrix in MODEL.matrices.items():
        weight = ckpt.linear(module, *matrix.codes.shape)
        assert torch.equal(effective(weight), matrix.value), module
        if isinstance(weight, NVFP4Weight) and name not in ("modelopt w4a8", "modelopt mixed"):
            weight_only = "a16" in name or "w4a16" in name
            assert weight.input_scale == (None if weight_only else dialects.INPUT_SCALE)
    # sums of at most 288 products in float32, in different orders, through two layers; logits are of order 1
    torch.testing.assert_close(logits(Checkpoint.open(folder)), expected, rtol=0, atol=1e-4)
    notes = ckpt.notes
    assert len(notes) == (1 if name in NOTES else 0), notes
    assert all(NOTES[name] in note for note in notes)


@pytest.mark.parametrize("name", ["modelopt nvfp4", "compressed-tensors mixed", "modelopt awq"])
def test_shards_and_the_spelling_of_transformers_4_change_nothing(tmp_path: Path, name: str, expected: Tensor) -> None:
    older = {"rope_parameters": None, "rope_theta": 10000.0, "dtype": None, "torch_dtype": "float32"}
    folder = DIALECTS[name].save(tmp_path / "m", MODEL, shards=3, **older)
    torch.testing.assert_close(logits(Checkpoint.open(folder)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_bytes_by_format_add_up_to_the_files(tmp_path: Path, name: str) -> None:
    ckpt = Checkpoint.open(DIALECTS[name].save(tmp_path / "m", MODEL))
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert sum(ckpt.nbytes_by_format().values()) == sum(t.nbytes for t in stored.values())
    assert "unknown" not in ckpt.nbytes_by_format()


def test_llm_compressor_s_weights_are_dequantised_bit_for_bit(shared: Path) -> None:
    """Dividing by the stored global scale: multiplying by its reciprocal misses the last bit of most layers."""
    folder = shared / "fixtures" / "llmcompressor-llama-nvfp4"
    ckpt = Checkpoint.open(folder)
    stored = load_file(folder / "model.safetensors")
    by_product = 0
    reference = load_file(folder / "reference" / "dequant_weights.safetensors")
    for name, want in reference.items():
        module = name.removesuffix(".weight")
        weight = ckpt.linear(module, *want.shape)
        assert isinstance(weight, NVFP4Weight)
        assert torch.equal(weight.dequantize(), want)
        assert weight.input_scale == float(1 / stored[f"{module}.input_global_scale"])
        by_product += torch.equal(weight.operand().float() * weight.row_scale_2().unsqueeze(1), want)
    assert len(reference) == 14
    assert by_product < 14  # or this test shows nothing
    assert ckpt.quant.algo == "NVFP4"
    assert ckpt.notes == ()


def test_w4a8_of_half_the_scales_is_refused_where_nvfp4_is_declared(tmp_path: Path) -> None:
    """A compressed re-export keeps half of the block scales: the shapes alone look like W4A8."""
    dialect = dialects.Dialect(dialects.w4a8, dialects.section("NVFP4"), dialects.record("NVFP4"))
    ckpt = Checkpoint.open(dialect.save(tmp_path / "m", MODEL))
    module, matrix = next(iter(MODEL.matrices.items()))
    with pytest.raises(TensorShapeError, match="as NVFP4 declares"):
        ckpt.linear(module, *matrix.codes.shape)


def test_a_mixed_file_that_contradicts_itself_is_noted(tmp_path: Path) -> None:
    dialect = DIALECTS["modelopt mixed"]
    assert dialect.section is not None
    layers = dict(dialect.section["quantized_layers"])
    module = "model.layers.0.self_attn.q_proj"
    layers[module] = {"quant_algo": "NVFP4"}
    del layers["model.layers.1.mlp.down_proj"]
    folder = dialect.save(tmp_path / "m", MODEL)
    record = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": record}))
    ckpt = Checkpoint.open(folder)
    for name, matrix in MODEL.matrices.items():
        ckpt.linear(name, *matrix.codes.shape)
    text = "\n".join(ckpt.notes)
    assert "quantized_layers: config.json and hf_quant_config.json differ in" in text
    assert f"1 layer(s) are FP8 although the config declares NVFP4 for them, e.g. {module}" in text
    assert "1 layer(s) are packed NVFP4 although the config declares nothing for them" in text
