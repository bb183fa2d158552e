"""Writes a shape's two Hugging Face folders, ModelOpt NVFP4 and its BF16 twin, into a cache; made once, then found."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loadtest.bench_cpu.shapes import Shape
from loadtest.bench_cpu.weights import Packed, dequantise, random_bf16, random_packed, to_bf16

VERSION = 1  # raise it when what is written changes
EXCLUDED = ("lm_head", "model.embed_tokens")
INPUT_SCALE = 4.0 / (6 * 448)  # of activations up to 4, as an RMSNorm's outputs are; W4A4 needs one
SPECIAL = ("<s>", "</s>", "<unk>")
_WIDTHS = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}


class Stored(NamedTuple):
    """A tensor to write: safetensors' dtype and shape, and a function that makes its bytes when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], bytes]


class Folders(NamedTuple):
    nvfp4: Path
    bf16: Path


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "nvfp4" / f"bench-{VERSION}"


def ensure(shape: Shape, cache: Path, seed: int = 0) -> Folders:
    """The shape's folders in `cache`, written where they are missing: 0.7 and 2.2 GB for the 1.1B shape."""
    return Folders(ensure_one(shape, cache, True, seed), ensure_one(shape, cache, False, seed))


def ensure_one(shape: Shape, cache: Path, quantised: bool, seed: int = 0) -> Path:
    """One of the two folders: the NVFP4 one, or its BF16 twin."""
    folder = cache / f"{shape.name}-{'NVFP4' if quantised else 'BF16'}"
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tensors = nvfp4_tensors if quantised else bf16_tensors
        write_safetensors(folder / "model.safetensors", list(tensors(shape, seed)))
        write_words(folder, shape.vocab)
        write_configs(folder, shape, quantised)  # last: it says the folder is whole
    return folder


def linear(shape: Shape, seed: int, layer: int, name: str) -> Packed:
    """One linear of the model; the same on every call, so that both folders and any GGUF hold the same weights."""
    index = layer * len(shape.linears()) + list(shape.linears()).index(name)
    return random_packed(np.random.default_rng((seed, 1, index)), *shape.linears()[name])


def bf16_linear(shape: Shape, seed: int, layer: int, name: str) -> bytes:
    return dequantise(linear(shape, seed, layer, name)).tobytes()


def embedding(shape: Shape, seed: int) -> bytes:
    return random_bf16(np.random.default_rng((seed, 2)), shape.vocab, shape.hidden, 1.0).tobytes()


def head(shape: Shape, seed: int) -> bytes:
    """Twice the usual size: top logits then stand far enough apart that greedy tokens survive small differences."""
    return random_bf16(np.random.default_rng((seed, 3)), shape.vocab, shape.hidden, 2 * shape.hidden**-0.5).tobytes()


def norm(shape: Shape) -> bytes:
    return to_bf16(np.ones(shape.hidden, dtype=np.float32)).tobytes()


def plain_tensors(shape: Shape, seed: int) -> Iterator[Stored]:
    """What both folders share."""
    yield Stored("model.embed_tokens.weight", "BF16", (shape.vocab, shape.hidden), lambda: embedding(shape, seed))
    yield Stored("lm_head.weight", "BF16", (shape.vocab, shape.hidden), lambda: head(shape, seed))
    norms = [f"{p}.{kind}" for p in shape.layer_prefixes() for kind in ("input_layernorm", "post_attention_layernorm")]
    for name in [*norms, "model.norm"]:
        yield Stored(f"{name}.weight", "BF16", (shape.hidden,), lambda: norm(shape))


def nvfp4_tensors(shape: Shape, seed: int) -> Iterator[Stored]:
    yield from plain_tensors(shape, seed)
    for layer, prefix in enumerate(shape.layer_prefixes()):
        for name, (n, k) in shape.linears().items():
            weight = linear(shape, seed, layer, name)
            module = f"{prefix}.{name}"
            yield Stored(f"{module}.weight", "U8", (n, k // 2), weight.codes.tobytes)
            yield Stored(f"{module}.weight_scale", "F8_E4M3", (n, k // 16), weight.scales.tobytes)
            yield Stored(f"{module}.weight_scale_2", "F32", (), partial(struct.pack, "<f", weight.scale_2))
            yield Stored(f"{module}.input_scale", "F32", (), partial(struct.pack, "<f", INPUT_SCALE))


def bf16_tensors(shape: Shape, seed: int) -> Iterator[Stored]:
    yield from plain_tensors(shape, seed)
    for layer, prefix in enumerate(shape.layer_prefixes()):
        for name, (n, k) in shape.linears().items():
            yield Stored(f"{prefix}.{name}.weight", "BF16", (n, k), partial(bf16_linear, shape, seed, layer, name))


def write_safetensors(path: Path, tensors: list[Stored]) -> None:
    """One file, widest types first so that every tensor is aligned to its own width."""
    tensors = sorted(tensors, key=lambda t: -_WIDTHS[t.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + math.prod(tensor.shape) * _WIDTHS[tensor.dtype]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for tensor in tensors:
            data = tensor.make()
            assert len(data) == math.prod(tensor.shape) * _WIDTHS[tensor.dtype], tensor.name
            file.write(data)


def vocabulary(size: int) -> list[str]:
    """Token i's text: three special tokens, the 256 bytes that a GGUF vocabulary needs, then made-up short words."""
    fixed = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    return [*fixed, *(f"\u2581w{i}" for i in range(len(fixed), size))]


def write_words(folder: Path, size: int) -> None:
    """A word-level tokenizer of `size` made-up words: prompts are sent as ids, and answers need some text."""
    words = vocabulary(size)
    special = [
        {"id": i, "content": word, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, word in enumerate(SPECIAL)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    _write_json(folder / "tokenizer_config.json", config | {"unk_token": "<unk>"})


def write_configs(folder: Path, shape: Shape, quantised: bool) -> None:
    if quantised:
        producer = {"name": "modelopt", "version": "0.47.0"}
        record = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": EXCLUDED}
        _write_json(folder / "hf_quant_config.json", {"producer": producer, "quantization": record})
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    if quantised:
        group = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
        config["quantization_config"] = {
            "config_groups": {"group_0": {"input_activations": group, "weights": group, "targets": ["Linear"]}},
            "ignore": EXCLUDED,
            "quant_algo": "NVFP4",
            "producer": producer,
            "quant_method": "modelopt",
        }
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    _write_json(folder / "shape.json", asdict(shape))
    _write_json(folder / "config.json", config)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
