"""Linear layers: which parts share a kernel, what is asked for by name, which biases are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import ConfigError, MissingTensorError, UnexpectedTensorError
from nvfp4_runtime.kernels.ops import LinearKernel
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.reference.linear import ReferenceLinear
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.layers.linear import Linear
from tests.tiny import llama_config, pack_tensors, random_tensors, write_modelopt, write_plain

PREFIX = "model.layers.0.self_attn"
QKV = [f"{PREFIX}.{name}" for name in ("q_proj", "k_proj", "v_proj")]


def kernels(**options: Any) -> Kernels:
    return Kernels([ReferenceBackend()], "float32", **options)


def sizes(config: dict[str, Any]) -> list[int]:
    kv = config["num_key_value_heads"] * config["head_dim"]
    return [config["num_attention_heads"] * config["head_dim"], kv, kv]


def test_parts_of_one_format_share_a_kernel_and_keep_their_scales(tmp_path: Path) -> None:
    config = llama_config()
    write_modelopt(tmp_path, config, random_tensors(config), share_scale_2=False)
    ckpt = Checkpoint.open(tmp_path)
    fused = Linear.fused(ckpt, kernels(), "qkv_proj", QKV, sizes(config), config["hidden_size"])
    assert len(fused.kernels) == 1
    x = torch.randn(3, config["hidden_size"])
    apart = [
        x @ ckpt.linear(prefix, n, config["hidden_size"]).dequantize().T  # type: ignore[union-attr]  # all are NVFP4
        for prefix, n in zip(QKV, sizes(config), strict=True)
    ]
    torch.testing.assert_close(fused(x), torch.cat(apart, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("plain", "num_kernels"), [("q_proj", 2), ("k_proj", 3), ("v_proj", 2)])
def test_parts_of_different_formats_stay_apart_and_are_joined_in_order(
    tmp_path: Path, plain: str, num_kernels: int
) -> None:
    config = llama_config()
    tensors = random_tensors(config)
    write_modelopt(tmp_path, config, tensors, exclude=["lm_head", f"{PREFIX}.{plain}"])
    ckpt = Checkpoint.open(tmp_path)
    seen: list[tuple[str, ...]] = []

    def observe(names: tuple[str, ...], kernel: LinearKernel) -> LinearKernel:
        seen.append(names)
        return kernel

    fused = Linear.fused(ckpt, kernels(observe=observe), "qkv_proj", QKV, sizes(config), config["hidden_size"])
    assert len(fused.kernels) == num_kernels
    assert [name for names in seen for name in names] == QKV
    x = torch.randn(3, config["hidden_size"])
    parts = torch.split(fused(x), sizes(config), dim=1)
    at = [p.rpartition(".")[2] for p in QKV].index(plain)
    torch.testing.assert_close(parts[at], x @ tensors[f"{PREFIX}.{plain}.weight"].T, rtol=1e-5, atol=1e-5)
    for prefix, n, part in zip(QKV, sizes(config), parts, strict=True):
        alone = Linear.single(ckpt, kernels(), prefix, n, config["hidden_size"])
        torch.testing.assert_close(part, alone(x), rtol=1e-5, atol=1e-5)


def test_a_bias_that_should_be_there_is_missed_by_name(tmp_path: Path) -> None:
    config = llama_config()
    write_plain(tmp_path, config, random_tensors(config))
    with pytest.raises(MissingTensorError, match=r"q_proj\.bias"):
        Linear.fused(
            Checkpoint.open(tmp_path), kernels(), "qkv_proj", QKV, sizes(config), config["hidden_size"], bias=True
        )


def test_a_bias_the_architecture_has_not_is_refused_by_name(tmp_path: Path) -> None:
    config = llama_config()
    tensors = random_tensors(config) | {f"{PREFIX}.k_proj.bias": torch.zeros(sizes(config)[1])}
    write_plain(tmp_path, config, tensors)
    with pytest.raises(UnexpectedTensorError, match=r"k_proj\.bias"):
        Linear.fused(Checkpoint.open(tmp_path), kernels(), "qkv_proj", QKV, sizes(config), config["hidden_size"])


def test_w4a4_without_an_input_scale_says_what_to_do(tmp_path: Path) -> None:
    config = llama_config()
    write_modelopt(tmp_path, config, random_tensors(config), input_scale=None)
    with pytest.raises(ConfigError, match="input_scale"):
        Linear.fused(
            Checkpoint.open(tmp_path),
            kernels(numerics="w4a4"),
            "qkv_proj",
            QKV,
            sizes(config),
            config["hidden_size"],
        )


def test_the_largest_input_scale_serves_fused_parts(tmp_path: Path) -> None:
    """One activation enters all parts, so W4A4 quantises it once: for the part that needs the widest range."""
    config = llama_config()
    packed = pack_tensors(random_tensors(config), ["lm_head"], 0.01, None, True)
    packed[f"{QKV[1]}.input_scale"] = torch.tensor(0.25)
    write_plain(tmp_path, config, packed)
    kernel = (
        Linear.fused(
            Checkpoint.open(tmp_path), kernels(numerics="w4a4"), "qkv_proj", QKV, sizes(config), config["hidden_size"]
        )
    ).kernels[0]
    assert isinstance(kernel, ReferenceLinear)
    assert kernel.input_scale == 0.25
