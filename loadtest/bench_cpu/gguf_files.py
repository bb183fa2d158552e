"""The same models as GGUF files: NVFP4 (its codes and scales rearranged, bit for bit) and BF16, for llama.cpp.

Written here from the weights, so that neither llama.cpp's converter nor its requirements are needed. Layout facts:
GGUF version 3; ggml's type 40 stores 64 weights in 36 bytes, four E4M3 scales, then per 16 weights 8 bytes whose low
nibbles are weights 0 to 7 and high nibbles 8 to 15; the tensor's scale is `NAME.scale`, multiplied into the result.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loadtest.bench_cpu import checkpoints
from loadtest.bench_cpu.shapes import Shape
from loadtest.bench_cpu.weights import Packed, dequantise

ALIGNMENT = 32
F32, BF16, NVFP4 = 0, 30, 40  # ggml's tensor types
FILE_TYPES = {"bf16": 32, "nvfp4": 39}  # llama.cpp's general.file_type
NORMAL_TOKEN, UNKNOWN_TOKEN, CONTROL_TOKEN, BYTE_TOKEN = 1, 2, 3, 6
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BYTES = {F32: 4.0, BF16: 2.0, NVFP4: 36 / 64}


class Stored(NamedTuple):
    """`shape` outermost first, as everywhere but in GGUF's own headers."""

    name: str
    kind: int
    shape: tuple[int, ...]
    make: Callable[[], bytes]

    @property
    def nbytes(self) -> int:
        return int(math.prod(self.shape) * _BYTES[self.kind])


def write(path: Path, shape: Shape, kind: str, seed: int = 0) -> None:
    """`path` with the model in `kind`, "nvfp4" (head and embedding BF16) or "bf16"; it appears whole or not at all."""
    fields = [*metadata(shape, kind), *vocabulary_fields(shape)]
    tensors = list(model_tensors(shape, kind, seed))
    unfinished = path.with_suffix(".partial")
    with unfinished.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)))
        for name, value in fields:
            file.write(text(name) + value)
        offset = 0
        for tensor in tensors:
            sizes = struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
            file.write(text(tensor.name) + struct.pack("<I", len(tensor.shape)) + sizes)
            file.write(struct.pack("<IQ", tensor.kind, offset))
            offset += padded(tensor.nbytes)
        file.write(b"\0" * (padded(file.tell()) - file.tell()))
        for tensor in tensors:
            data = tensor.make()
            assert len(data) == tensor.nbytes, tensor.name
            file.write(data + b"\0" * (padded(len(data)) - len(data)))
    unfinished.rename(path)


def metadata(shape: Shape, kind: str) -> Iterator[tuple[str, bytes]]:
    yield "general.architecture", string("llama")
    yield "general.name", string(shape.name)
    yield "general.file_type", uint32(FILE_TYPES[kind])
    yield "general.quantization_version", uint32(2)
    counts = {
        "block_count": shape.layers,
        "context_length": shape.max_positions,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.mlp,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.head_dim,
        "vocab_size": shape.vocab,
    }
    yield from ((f"llama.{name}", uint32(count)) for name, count in counts.items())
    yield "llama.attention.layer_norm_rms_epsilon", float32(1e-5)
    yield "llama.rope.freq_base", float32(10000.0)


def vocabulary_fields(shape: Shape) -> Iterator[tuple[str, bytes]]:
    words = checkpoints.vocabulary(shape.vocab)
    kinds = [CONTROL_TOKEN, CONTROL_TOKEN, UNKNOWN_TOKEN, *[BYTE_TOKEN] * 256]
    kinds += [NORMAL_TOKEN] * (len(words) - len(kinds))
    yield "tokenizer.ggml.model", string("llama")
    yield "tokenizer.ggml.tokens", array(8, [text(word) for word in words])
    yield "tokenizer.ggml.scores", array(6, [struct.pack("<f", -float(i)) for i in range(len(words))])
    yield "tokenizer.ggml.token_type", array(5, [struct.pack("<i", kind) for kind in kinds])
    for i, name in enumerate(("bos", "eos", "unknown")):
        yield f"tokenizer.ggml.{name}_token_id", uint32(i)


def model_tensors(shape: Shape, kind: str, seed: int) -> Iterator[Stored]:
    matrix = (shape.vocab, shape.hidden)
    ones = np.ones(shape.hidden, dtype=np.float32).tobytes()
    yield Stored("token_embd.weight", BF16, matrix, lambda: checkpoints.embedding(shape, seed))
    yield Stored("output.weight", BF16, matrix, lambda: checkpoints.head(shape, seed))
    yield Stored("output_norm.weight", F32, (shape.hidden,), lambda: ones)
    for layer in range(shape.layers):
        for name in ("attn_norm", "ffn_norm"):
            yield Stored(f"blk.{layer}.{name}.weight", F32, (shape.hidden,), lambda: ones)
        for name, (n, k) in shape.linears().items():
            there = f"blk.{layer}.{NAMES[name]}"
            if kind == "bf16":
                yield Stored(f"{there}.weight", BF16, (n, k), partial(bf16_bytes, shape, seed, layer, name))
                continue
            yield Stored(f"{there}.weight", NVFP4, (n, k), partial(nvfp4_bytes, shape, seed, layer, name))
            scale_2 = checkpoints.linear(shape, seed, layer, name).scale_2
            for scale, value in (("scale", scale_2), ("input_scale", checkpoints.INPUT_SCALE)):
                yield Stored(f"{there}.{scale}", F32, (1,), partial(struct.pack, "<f", value))


def bf16_bytes(shape: Shape, seed: int, layer: int, name: str) -> bytes:
    return dequantise(turned(shape, name, checkpoints.linear(shape, seed, layer, name))).tobytes()


def nvfp4_bytes(shape: Shape, seed: int, layer: int, name: str) -> bytes:
    return nvfp4_blocks(turned(shape, name, checkpoints.linear(shape, seed, layer, name)))


def turned(shape: Shape, name: str, weight: Packed) -> Packed:
    """Query and key rows in GGUF's order: of each head x0 y0 x1 y1 ... where Hugging Face has x0 x1 ... y0 y1 ..."""
    heads = {"self_attn.q_proj": shape.heads, "self_attn.k_proj": shape.kv_heads}.get(name)
    if heads is None:
        return weight
    rows = np.arange(len(weight.codes)).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return Packed(weight.codes[rows], weight.scales[rows], weight.scale_2)


def nvfp4_blocks(weight: Packed) -> bytes:
    """ggml's 36-byte blocks. K a multiple of 64."""
    n, half = weight.codes.shape
    pairs = weight.codes.reshape(n, half // 8, 8)
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(n, half // 8, 16)
    joined: npt.NDArray[np.uint8] = codes[:, :, :8] | codes[:, :, 8:] << 4
    scales = weight.scales.reshape(n, half // 32, 4)
    return np.concatenate([scales, joined.reshape(n, half // 32, 32)], axis=-1).tobytes()


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def string(value: str) -> bytes:
    return struct.pack("<I", 8) + text(value)


def uint32(value: int) -> bytes:
    return struct.pack("<II", 4, value)


def float32(value: float) -> bytes:
    return struct.pack("<If", 6, value)


def array(kind: int, items: list[bytes]) -> bytes:
    return struct.pack("<IIQ", 9, kind, len(items)) + b"".join(items)
