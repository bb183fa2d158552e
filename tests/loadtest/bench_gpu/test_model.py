"""The synthetic model: two folders that are one function, written tensor by tensor."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from safetensors.torch import load_file

from loadtest.bench_gpu.model import LLAMA_8B, TINY, ensure, num_bytes, stored
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.nvfp4 import codec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("models")
    return ensure(TINY, scratch, True, CPU), ensure(TINY, scratch, False, CPU)


def test_the_twin_holds_exactly_the_dequantised_weights(folders):
    packed, plain = (load_file(folder / "model.safetensors") for folder in folders)
    name = "model.layers.1.mlp.down_proj"
    scale = packed[f"{name}.weight_scale"].view(torch.float8_e4m3fn)
    values = codec.dequantize(packed[f"{name}.weight"], scale, packed[f"{name}.weight_scale_2"])
    assert torch.equal(values, plain[f"{name}.weight"].float())
    assert 0.3 < float(values.std()) * values.shape[1] ** 0.5 < 3
    assert torch.equal(packed["lm_head.weight"], plain["lm_head.weight"])
    assert not torch.equal(packed["lm_head.weight"], packed["model.embed_tokens.weight"])


def test_our_reader_takes_it_as_modelopt(folders):
    weight = Checkpoint.open(str(folders[0])).linear("model.layers.0.self_attn.q_proj", 128, 64)
    assert weight.format == "nvfp4"
    assert weight.input_scale == pytest.approx(4 / 2688)


def test_an_existing_folder_is_found_and_a_broken_one_written_again(folders, tmp_path):
    before = (folders[0] / "model.safetensors").stat().st_mtime_ns
    assert ensure(TINY, folders[0].parent, True, CPU) == folders[0]
    assert (folders[0] / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / folders[0].name).mkdir()
    (tmp_path / folders[0].name / "model.safetensors").write_bytes(b"cut off")
    again = ensure(TINY, tmp_path, True, CPU)
    assert (again / "model.safetensors").read_bytes() == (folders[0] / "model.safetensors").read_bytes()


def test_nothing_is_drawn_before_its_turn(monkeypatch):
    made: list[weakref.ref[torch.Tensor]] = []
    real = torch.randint

    def counted(*args, **options):
        tensor = real(*args, **options)
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(torch, "randint", counted)
    tensors = list(stored(TINY, True, CPU, 0))
    assert not made, "naming tensors draws none"
    for tensor in tensors:
        tensor.make()
    assert made
    assert not [ref for ref in made if ref() is not None], "what was written is let go"


def test_sizes_are_llamas():
    names = {field.name: getattr(LLAMA_8B, field.name) for field in dataclasses.fields(LLAMA_8B)}
    assert names["vocab"] == 128256
    assert LLAMA_8B.num_linear == pytest.approx(6.98e9, rel=1e-3)
    assert LLAMA_8B.kv_bytes(1, 2.0) == 128 << 10
    assert num_bytes(LLAMA_8B, False) == pytest.approx(16.06e9, rel=1e-2)
    assert num_bytes(TINY, True) < num_bytes(TINY, False)
