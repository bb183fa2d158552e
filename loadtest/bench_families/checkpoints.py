"""Writes a family's Hugging Face folder in ModelOpt's NVFP4 layout, with random weights; made once, then found."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from loadtest.bench_cpu.checkpoints import INPUT_SCALE, Stored, write_safetensors, write_words
from loadtest.bench_cpu.weights import Packed, random_packed, to_bf16
from loadtest.bench_families.families import VOCAB, Family, Plain


def ensure(family: Family, cache: Path, seed: int = 0) -> Path:
    """The family's folder in `cache`, written where it is missing."""
    folder = cache / f"family-{family.name}"
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_safetensors(folder / "model.safetensors", list(tensors(family, seed)))
        write_words(folder, VOCAB)
        _write_configs(folder, family)  # last: it says the folder is whole
    return folder


def tensors(family: Family, seed: int) -> Iterator[Stored]:
    for i, (name, plain) in enumerate(family.plain.items()):
        yield Stored(name, "BF16", plain.shape, partial(_plain_bytes, plain, seed, i))
    for i, (module, (n, k)) in enumerate(family.packed.items()):
        make = partial(_packed, seed, i, n, k)
        yield Stored(f"{module}.weight", "U8", (n, k // 2), partial(_codes, make))
        yield Stored(f"{module}.weight_scale", "F8_E4M3", (n, k // 16), partial(_scales, make))
        yield Stored(f"{module}.weight_scale_2", "F32", (), partial(_scale_2, make))
        yield Stored(f"{module}.input_scale", "F32", (), partial(struct.pack, "<f", INPUT_SCALE))


def _plain_bytes(plain: Plain, seed: int, index: int) -> bytes:
    values = np.random.default_rng((seed, 2, index)).standard_normal(math.prod(plain.shape), dtype=np.float32)
    return to_bf16(values * np.float32(plain.std) + np.float32(plain.mean)).tobytes()


def _packed(seed: int, index: int, n: int, k: int) -> Packed:
    return random_packed(np.random.default_rng((seed, 1, index)), n, k)


def _codes(make: partial[Packed]) -> bytes:
    return make().codes.tobytes()


def _scales(make: partial[Packed]) -> bytes:
    return make().scales.tobytes()


def _scale_2(make: partial[Packed]) -> bytes:
    return struct.pack("<f", make().scale_2)


def _write_configs(folder: Path, family: Family) -> None:
    producer = {"name": "modelopt", "version": "0.47.0"}
    exclude = list(family.exclude)
    record = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": exclude}
    group = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    section = {
        "config_groups": {"group_0": {"input_activations": group, "weights": group, "targets": ["Linear"]}},
        "ignore": exclude,
        "quant_algo": "NVFP4",
        "producer": producer,
        "quant_method": "modelopt",
    }
    for name, value in (
        ("hf_quant_config.json", {"producer": producer, "quantization": record}),
        ("generation_config.json", {"bos_token_id": 0, "eos_token_id": 1}),
        ("config.json", family.config | {"quantization_config": section}),
    ):
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
