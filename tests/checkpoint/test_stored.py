"""What names, dtypes and shapes tell of a module: every dialect's spelling, and every tensor counted exactly once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.checkpoint.stored import StoredLayer, loose, modules, stored_layer
from nvfp4_runtime.errors import CheckpointError, MissingTensorError, TensorShapeError, UnsupportedFormatError
from tests import tiny

N, K, E = 48, 64, 3
P = "model.layers.0.mlp.down_proj"
S = "model.layers.0.mlp.experts.gate_up_proj"


def u8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def e4m3(*shape: int) -> torch.Tensor:
    return u8(*shape).view(torch.float8_e4m3fn)


def f32(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def bf16(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


MODELOPT = {".weight": u8(N, K // 2), ".weight_scale": e4m3(N, K // 16), ".weight_scale_2": f32()}
CT = {".weight_packed": u8(N, K // 2), ".weight_scale": e4m3(N, K // 16), ".weight_global_scale": f32(1)}
SOUND = [
    (P, MODELOPT, "modelopt", "nvfp4", (1, 16), 0, False),
    (P, MODELOPT | {".input_scale": f32(), ".pre_quant_scale": bf16(K)}, "modelopt", "nvfp4", (1, 16), 0, False),
    (P, MODELOPT | {".weight_scale": e4m3(1, N, K // 16)}, "modelopt", "nvfp4", (1, 16), 0, False),
    (P, MODELOPT | {".weight_scale": e4m3(N, K // 32)}, "modelopt", "nvfp4", (1, 32), 0, False),
    (P, CT, "compressed-tensors", "nvfp4", (1, 16), 0, False),
    (
        P,
        {".weight_packed": u8(N, K // 2), ".weight_scale": u8(N, K // 32)},
        "compressed-tensors",
        "mxfp4",
        (1, 32),
        0,
        False,
    ),
    (P, {".weight": e4m3(N, K), ".weight_scale": f32()}, "modelopt", "fp8", (N, K), 0, False),
    (P, {".weight": e4m3(N, K), ".weight_scale": f32(N)}, "modelopt", "fp8", (1, K), 0, False),
    (P, {".weight": e4m3(N, K), ".weight_scale": bf16(N, 1)}, "compressed-tensors", "fp8", (1, K), 0, False),
    (P, {".weight": e4m3(N, K), ".weight_scale": bf16(1)}, "compressed-tensors", "fp8", (N, K), 0, False),
    (P, {".weight": e4m3(256, K), ".weight_scale": f32(2, 1, 1, 1)}, "modelopt", "fp8", (128, 128), 0, False),
    (P, {".weight": e4m3(200, 130), ".weight_scale_inv": f32(2, 2)}, "deepseek", "fp8", (128, 128), 0, False),
    (P, {".weight": e4m3(N, K), ".weight_scale_inv": f32(3, 4)}, "deepseek", "fp8", (16, 16), 0, False),
    (P, {".weight": bf16(N, K), ".bias": bf16(N)}, "plain", "bf16", None, 0, False),
    (
        S,
        {"": u8(E, K // 2, N), "_weight_scale": e4m3(E, K // 16, N), "_weight_scale_2": f32(E)},
        "modelopt",
        "nvfp4",
        (1, 16),
        E,
        True,
    ),
    (
        S,
        {"": u8(E, N, K // 2), "_weight_scale": e4m3(E, N, K // 16), "_weight_scale_2": f32()},
        "modelopt",
        "nvfp4",
        (1, 16),
        E,
        False,
    ),
    (
        S,
        {"_packed": u8(E, N, K // 2), "_scale": e4m3(E, N, K // 16), "_global_scale": f32(E, 2)},
        "compressed-tensors",
        "nvfp4",
        (1, 16),
        E,
        False,
    ),
    (
        S,
        {"_blocks": u8(E, N, K // 32, 16), "_scales": u8(E, N, K // 32), "_bias": bf16(E, N)},
        "gpt-oss",
        "mxfp4",
        (1, 32),
        E,
        False,
    ),
]


def read(folder: Path, tensors: dict[str, torch.Tensor]) -> Shards:
    save_file(tensors, folder / "model.safetensors")
    return Shards(folder)


def one(folder: Path, prefix: str, tensors: dict[str, torch.Tensor]) -> StoredLayer:
    shards = read(folder, {prefix + suffix: t for suffix, t in tensors.items()})
    (layer,) = modules(shards)
    assert sorted(layer.tensors.values()) == sorted(info.name for info in shards)
    again = stored_layer(shards, prefix)
    assert again is not None
    assert (again.format, again.n, again.k, again.tensors) == (layer.format, layer.n, layer.k, layer.tensors)
    return layer


@pytest.mark.parametrize(("prefix", "tensors", "dialect", "form", "block", "experts", "transposed"), SOUND)
def test_every_spelling_is_told_from_its_tensors(tmp_path, prefix, tensors, dialect, form, block, experts, transposed):
    layer = one(tmp_path, prefix, tensors)
    assert layer.problem is None
    found = (layer.dialect, layer.format, layer.block, layer.experts, layer.transposed)
    assert found == (dialect, form, block, experts, transposed)
    if form in ("nvfp4", "mxfp4"):
        assert (layer.n, layer.k) == (N, K)
    weight_bytes = sum(t.nbytes for suffix, t in tensors.items() if not suffix.endswith("bias"))
    assert layer.nbytes == weight_bytes
    assert layer.bits_per_weight == 8 * weight_bytes / (max(1, experts) * layer.n * layer.k)


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        ({".weight": u8(N, 8)}, MissingTensorError, r"weight_scale.*meaningless without its scales"),
        (MODELOPT | {".weight_scale_2": None}, MissingTensorError, r"weight_scale_2"),
        (CT | {".weight_global_scale": None}, MissingTensorError, r"weight_global_scale"),
        (MODELOPT | {".weight_scale": e4m3(128, 4)}, TensorShapeError, r"\[48, 4\], row-major .*not swizzled"),
        (MODELOPT | {".weight_scale": e4m3(N * 4)}, TensorShapeError, "not swizzled"),
        (MODELOPT | {".weight_scale": f32(N, 4)}, TensorShapeError, r"F8_E4M3 \[48, 4\], found F32"),
        (MODELOPT | {".weight_scale": e4m3(N, 1)}, TensorShapeError, r"expected F8_E4M3 \[48, 4\]"),
        (MODELOPT | {".weight_packed": u8(N, 8)}, UnsupportedFormatError, "two tensors that mean its weight"),
        (MODELOPT | {".weight_global_scale": f32(1)}, UnsupportedFormatError, "two tensors that mean its tensor scale"),
        (MODELOPT | {".input_scale_2": f32()}, UnsupportedFormatError, "Quark"),
        ({".weight": torch.zeros(N, 8, dtype=torch.uint32)}, UnsupportedFormatError, "MLX"),
        ({".weight": u8(N, 8), ".scales": u8(N, 1)}, UnsupportedFormatError, "MLX"),
        ({".qweight": torch.zeros(4, 4, dtype=torch.int32)}, UnsupportedFormatError, "GPTQ"),
        ({"._weight_qdata": u8(N, 8), "._weight_scale": u8(N, 1)}, UnsupportedFormatError, "torchao"),
        ({".weight": e4m3(N, K)}, MissingTensorError, "weight_scale"),
        ({".weight": e4m3(N, K), ".weight_scale": u8(N, 2)}, UnsupportedFormatError, "MXFP8"),
        ({".weight": e4m3(N, K), ".weight_scale": f32(5, 7)}, TensorShapeError, r"\[48, 1\] \(per row\)"),
        ({".weight": f32(N, K), ".weight_scale": f32()}, TensorShapeError, "expected U8, since"),
        ({".weight": torch.zeros(4, 4, dtype=torch.int64)}, TensorShapeError, "found I64"),
    ],
)
def test_what_cannot_be_read_is_a_problem_not_a_guess(tmp_path, tensors, kind, message):
    sound = {P + suffix: t for suffix, t in tensors.items() if t is not None}
    layer = stored_layer(read(tmp_path, sound), P)
    assert layer is not None
    assert layer.format == "unknown"
    assert isinstance(layer.problem, kind)
    with pytest.raises(CheckpointError, match=message):
        raise layer.problem


def test_every_tensor_belongs_to_one_module_or_is_loose(tmp_path):
    attn = "model.layers.0.self_attn"
    names = {
        f"{attn}.k_proj.k_scale": "kv_scale",
        f"{attn}.kv_scale": "kv_scale",
        f"{attn}.qkv_proj.k_scale": "kv_scale",
        f"{attn}.attn.v_scale": "kv_scale",
        f"{attn}.k_scale": "kv_scale",
        "model.layers.9.mlp.up_proj.weight_scale": "orphan",
        "model.layers.0.mixer.A_log": "parameter",
    }
    folder = tiny.tiny_nvfp4_llama(tmp_path / "m", tokenizer=False)
    stored = load_file(folder / "model.safetensors")
    save_file(stored | {name: torch.ones(1) for name in names}, folder / "model.safetensors")
    shards = Shards(folder)
    assert {entry.info.name: entry.kind for entry in loose(shards)} == names
    owned = [name for layer in modules(shards) for name in layer.tensors.values()]
    assert sorted(owned) == sorted(stored)


def test_a_plain_stack_is_turned_the_way_its_sibling_fits(tmp_path):
    inner, hidden = 32, 64
    for folder, transposed in ((tmp_path / "a", False), (tmp_path / "b", True)):
        folder.mkdir()
        gate_up, down = bf16(E, 2 * inner, hidden), bf16(E, hidden, inner)
        if transposed:
            gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        shards = read(folder, {S: gate_up, S.replace("gate_up", "down"): down})
        layers = {layer.prefix: layer for layer in modules(shards)}
        assert all(layer.transposed is transposed for layer in layers.values())
        assert (layers[S].n, layers[S].k, layers[S].experts) == (2 * inner, hidden, E)


def test_convolutions_norms_and_embeddings_are_plain_modules(tmp_path):
    shards = read(tmp_path, {"conv1d.weight": bf16(8, 1, 4), "norm.weight": bf16(8), "embed.weight": f32(10, 8)})
    found = {layer.prefix: (layer.format, layer.n, layer.k, layer.experts) for layer in modules(shards)}
    assert found == {"conv1d": ("bf16", 8, 4, 0), "norm": ("bf16", 8, 1, 0), "embed": ("fp32", 10, 8, 0)}
