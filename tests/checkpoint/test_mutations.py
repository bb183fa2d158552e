"""Seeded damage to a sound checkpoint: always a clear error or a correct load, never a crash."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.checkpoint.doctor.inspect import inspect
from nvfp4_runtime.errors import CheckpointError
from tests import tiny

FILES = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "hf_quant_config.json")


def load_everything(folder: Path) -> None:
    """Read every layer as a two-layer Llama would, with the shapes of its original config."""
    ckpt = Checkpoint.open(folder)
    config = tiny.llama_config()
    for name, tensor in tiny.random_tensors(config).items():
        if tensor.dim() == 2 and "embed" not in name:
            weight = ckpt.linear(name.removesuffix(".weight"), *tensor.shape)
            dense = weight.dequantize() if weight.format == "nvfp4" else weight.weight
            assert dense.shape == tensor.shape
        else:
            assert ckpt.tensor(name, tuple(tensor.shape)).shape == tensor.shape
    for layer in range(2):
        ckpt.kv_scales(f"model.layers.{layer}.self_attn")
    ckpt.finish()


def damage(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    kind = rng.choice(
        ["truncate", "flip", "flip", "flip in header", "flip in header", "insert", "zero", "length", "swap"]
    )
    at = rng.randrange(len(data))
    if kind == "truncate":
        del data[at:]
    elif kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "flip in header":
        data[rng.randrange(min(2000, len(data)))] ^= 1 << rng.randrange(8)
    elif kind == "insert":
        data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    elif kind == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "length":
        data[:8] = rng.randrange(1 << 63).to_bytes(8, "little")
    else:
        other = rng.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    path.write_bytes(data)
    return kind


@pytest.mark.parametrize("seed", range(10))
def test_a_damaged_checkpoint_is_refused_clearly_or_loads(tmp_path, seed):
    sound = tmp_path / "sound"
    config = tiny.llama_config()
    tensors = tiny.random_tensors(config, dtype=torch.bfloat16)
    tiny.write_modelopt(sound, config, tensors, kv_scales=(0.1, 0.2), shards=2, tokenizer=False)
    load_everything(sound)
    rng = random.Random(seed)
    refusals: list[str] = []
    for i in range(30):
        folder = tmp_path / f"damaged{i}"
        shutil.copytree(sound, folder)
        damage(folder / rng.choice(FILES), rng)
        for read in (load_everything, inspect):
            try:
                read(folder)
            except CheckpointError as error:
                refusals.append(str(error))
        shutil.rmtree(folder)
    assert all(len(message) > 20 for message in refusals)
    assert len(refusals) > 10  # the damage is real: most of it cannot pass
