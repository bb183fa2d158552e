"""The benchmark's models are what they claim: one function in three files, which engine and GGUF reader load."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from loadtest.bench_cpu import checkpoints, gguf_files
from loadtest.bench_cpu.shapes import LARGE, SMALL, Shape
from loadtest.bench_cpu.weights import E2M1, E4M3, dequantise, random_packed, to_bf16
from nvfp4_runtime import LLM, SamplingParams
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.weight import NVFP4Weight

TINY = Shape("tiny", hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128, vocab=320, max_positions=256)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Folders:
    return checkpoints.ensure(TINY, tmp_path_factory.mktemp("cache"))


def test_sizes_are_those_of_the_measured_models():
    assert SMALL.num_parameters == 443_073_536
    assert LARGE.num_parameters == 1_104_218_112
    assert LARGE.num_linear == 973_078_528
    # 4.5 bits per weight of the layers, a BF16 head, one row of the embedding (not counted)
    assert LARGE.token_bytes() == 973_078_528 * 4.5 / 8 + 32000 * 2048 * 2
    assert SMALL.kv_bytes(8192, 1.0) == 2 * 24 * 8 * 64 * 8192


def test_tables_and_rounding_agree_with_the_codec_and_with_torch():
    positive = torch.tensor(codec.E2M1_VALUES)
    assert torch.equal(torch.from_numpy(E2M1), torch.cat([positive, -positive]))
    stored = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(torch.from_numpy(E4M3[:0x7F]), stored)
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])  # between two BF16 neighbours
    values = torch.cat([values, ties])
    assert torch.equal(torch.from_numpy(to_bf16(values.numpy())).view(torch.bfloat16), values.to(torch.bfloat16))


def test_the_twin_holds_exactly_the_dequantised_weights():
    packed = random_packed(np.random.default_rng(0), 48, 128)
    weight = NVFP4Weight(
        packed=torch.from_numpy(packed.codes.copy()),
        block_scale=torch.from_numpy(packed.scales).view(torch.float8_e4m3fn),
        weight_scale_2=torch.tensor([packed.scale_2]),
        group_rows=(48,),
        input_scale=None,
        bias=None,
    )
    twin = torch.from_numpy(dequantise(packed)).view(torch.bfloat16)
    assert torch.equal(twin.float(), weight.dequantize())
    assert 0.7 < float(twin.float().std()) * 128**0.5 < 1.4  # a power of two cannot come nearer than sqrt(2)


def test_both_folders_load_completely_and_say_the_same(folders):
    texts = []
    for folder in folders:
        llm = LLM(folder, num_blocks=33, backend="reference", dtype="float32")
        texts.append(llm.generate([[5, 300, 17, 280]], GREEDY)[0].token_ids)
        assert len(texts[-1]) == GREEDY.max_tokens
    # float32 throughout: equal up to summation order, and the head's logits stand far apart
    assert texts[0] == texts[1]


def test_the_nvfp4_folder_is_modelopts(folders):
    checkpoint = Checkpoint.open(folders.nvfp4)
    assert (checkpoint.quant.method, checkpoint.quant.algo) == ("modelopt", "NVFP4")
    weight = checkpoint.linear("model.layers.1.mlp.down_proj", 64, 128)
    assert isinstance(weight, NVFP4Weight)
    assert weight.input_scale == pytest.approx(checkpoints.INPUT_SCALE)
    size = (folders.nvfp4 / "model.safetensors").stat().st_size
    packed = TINY.token_bytes() + TINY.num_head * 2  # and the embedding
    assert packed < size < packed + 20_000  # header, norms, scalars


def test_a_folder_is_written_once_and_again_when_it_is_not_whole(folders, tmp_path):
    before = (folders.nvfp4 / "model.safetensors").stat().st_mtime_ns
    assert checkpoints.ensure(TINY, folders.nvfp4.parent) == folders
    assert (folders.nvfp4 / "model.safetensors").stat().st_mtime_ns == before
    made = checkpoints.ensure(TINY, tmp_path)
    (made.bf16 / "config.json").unlink()  # written last: without it the folder was cut short
    (made.bf16 / "model.safetensors").write_bytes(b"half")
    again = checkpoints.ensure(TINY, tmp_path)
    assert (again.bf16 / "model.safetensors").read_bytes() == (folders.bf16 / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["nvfp4", "bf16"])
def test_a_gguf_holds_the_same_weights_for_ggufs_own_reader(kind, tmp_path, folders):
    path = tmp_path / "tiny.gguf"
    gguf_files.write(path, TINY, kind)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    per_layer = 9 + (14 if kind == "nvfp4" else 0)
    assert len(tensors) == 3 + TINY.layers * per_layer
    fields = reader.fields
    assert fields["llama.attention.head_count_kv"].contents() == TINY.kv_heads
    assert fields["tokenizer.ggml.tokens"].contents()[:3] == list(checkpoints.SPECIAL)
    assert len(fields["tokenizer.ggml.token_type"].contents()) == TINY.vocab
    for name, heads in (("self_attn.q_proj", 4), ("self_attn.k_proj", 2), ("mlp.up_proj", None)):
        n, k = TINY.linears()[name]
        want = dequantise(checkpoints.linear(TINY, 0, 1, name))
        if heads is not None:  # x0 y0 x1 y1 ... per head, said once more in loops
            dim = n // heads
            order = [h * dim + half * dim // 2 + i for h in range(heads) for i in range(dim // 2) for half in (0, 1)]
            want = want[order]
        tensor = tensors[f"blk.1.{gguf_files.NAMES[name]}.weight"]
        assert list(tensor.shape) == [k, n]
        if kind == "bf16":
            assert np.array_equal(tensor.data.view(np.uint16).reshape(n, k), want)
            continue
        blocks = tensor.data.reshape(n, k // 64, 36)
        scale_2 = tensors[f"blk.1.{gguf_files.NAMES[name]}.scale"].data[0]
        for row, block, i in ((0, 0, 0), (n - 1, k // 64 - 1, 63), (3, 0, 21), (5, 0, 40)):
            scale = E4M3[blocks[row, block, i // 16]]
            byte = blocks[row, block, 4 + 8 * (i // 16) + i % 8]
            value = E2M1[byte & 15 if i % 16 < 8 else byte >> 4] * scale * scale_2
            assert to_bf16(np.array([value], dtype=np.float32))[0] == want[row, 64 * block + i]


def test_configs_are_json_any_reader_takes(folders):
    config = json.loads((folders.nvfp4 / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == list(checkpoints.EXCLUDED)
    assert "quantization_config" not in json.loads((folders.bf16 / "config.json").read_text())
    assert Path(folders.bf16 / "tokenizer.json").is_file()
