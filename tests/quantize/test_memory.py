"""A model far larger than what quantising it holds: the process's peak is bounded by one matrix, not by the model."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from tests.tiny import llama_config

HIDDEN, INNER, LAYERS = 2048, 8192, 6  # 0.8 GB in BF16; the largest tensor has 34 MB
LARGEST = HIDDEN * INNER * 2
SLACK = 96 << 20  # the temporaries of one matrix and pages given back only now and then

CHILD = """
import re, sys
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.quantize.pipeline import quantize_folder
from nvfp4_runtime.quantize.ptq import quantize_checkpoint
def peak_kib():  # of this program alone: ru_maxrss begins with what the parent had when it forked
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
quantize_folder(sys.argv[1], sys.argv[2], method=sys.argv[4], progress=False)  # a tiny model: all is imported and warm
before = peak_kib()
report = quantize_folder(sys.argv[3], sys.argv[2] + "-large", method=sys.argv[4], progress=False)
print(before, peak_kib(), report.num_weights / report.seconds)
"""


def write_sparse(folder: Path) -> Path:
    """A plain Llama of zeros whose weights take no room on the disk."""
    folder.mkdir()
    config = llama_config(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, vocab_size=256, dtype="bfloat16"
    ) | {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    square, wide, tall = [HIDDEN, HIDDEN], [INNER, HIDDEN], [HIDDEN, INNER]
    shapes = {"model.embed_tokens.weight": [256, HIDDEN], "model.norm.weight": [HIDDEN]}
    for i in range(LAYERS):
        for name in "qkvo":
            shapes[f"model.layers.{i}.self_attn.{name}_proj.weight"] = square
        for name, shape in (("gate", wide), ("up", wide), ("down", tall)):
            shapes[f"model.layers.{i}.mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = [HIDDEN]
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", ["max", "mse"])
def test_the_peak_is_below_twice_the_largest_matrix(tmp_path, tiny_source, method):
    source = write_sparse(tmp_path / "src")
    arguments = [str(tiny_source), str(tmp_path / "out"), str(source), method]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, peak, rate = map(float, done.stdout.split())
    print(f"\n{method}: {before / 1024:.0f} MB before, {peak / 1024:.0f} MB at most, {rate / 1e6:.1f} M weights/s")
    assert (peak - before) * 1024 < 2 * LARGEST + SLACK
    assert peak * 1024 < 2 * LARGEST + (1 << 30)
    assert Checkpoint.open(tmp_path / "out-large").quant.algo == "W4A16_NVFP4"


@pytest.fixture
def tiny_source(tmp_path: Path) -> Path:
    from tests.tiny import tiny_llama

    folder = tmp_path / "tiny"
    return tiny_llama(folder)
