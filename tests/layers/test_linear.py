"""Linear layers: which parts share a kernel, what is asked for by name, which biases are errors."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import ConfigError, MissingTensorError, UnexpectedTensorError
from nvfp4_runtime.kernels.ops import LinearKernel, LinearSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.reference.linear import ReferenceLinear
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.layers.linear import Linear, PreScaled
from nvfp4_runtime.models import load_model
from nvfp4_runtime.nvfp4.weight import NVFP4Weight
from tests import dialects
from tests.models.paged import PagedRunner
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


def test_a_pre_quant_scale_multiplies_the_input_and_differing_ones_stay_apart(tmp_path: Path) -> None:
    model = dialects.tiny_model()
    hidden = model.config["hidden_size"]
    x = torch.randn(3, hidden, generator=torch.Generator().manual_seed(0))
    for name, num_kernels in (("modelopt awq", 1), ("modelopt awq, q and k apart", 3)):
        ckpt = Checkpoint.open(dialects.dialects(model)[name].save(tmp_path / name, model))
        fused = Linear.fused(ckpt, kernels(), "qkv_proj", QKV, sizes(model.config), hidden)
        assert len(fused.kernels) == num_kernels
        assert all(isinstance(kernel, PreScaled) for kernel in fused.kernels)
        want = x @ torch.cat([model.matrices[prefix].value for prefix in QKV]).T
        torch.testing.assert_close(fused(x), want, rtol=1e-5, atol=1e-5)


def test_w4a4_quantises_the_scaled_input(tmp_path: Path) -> None:
    """input_scale was calibrated behind the pre_quant_scale."""
    model = dialects.tiny_model()
    prefix, k = f"{PREFIX}.o_proj", 128
    awq = dialects.dialects(model)["modelopt awq"].save(tmp_path / "m", model)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = Linear.single(Checkpoint.open(awq), kernels(numerics="w4a4"), prefix, 160, k)
    weight = Checkpoint.open(awq).linear(prefix, 160, k)
    assert isinstance(weight, NVFP4Weight)
    assert weight.pre_quant_scale is not None
    unscaled = replace(weight, pre_quant_scale=None)
    inner = kernels(numerics="w4a4").linear("o_proj", unscaled)
    torch.testing.assert_close(layer(x.float()), inner(x.float() * weight.pre_quant_scale), rtol=0, atol=0)


def test_a_pre_scaled_layer_makes_the_native_decoder_run_op_by_op(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = dialects.tiny_model()
    folder = dialects.dialects(model)["modelopt awq"].save(tmp_path / "m", model)
    backends = available_backends("auto")
    with caplog.at_level(logging.INFO):
        made = load_model(Checkpoint.open(folder), Kernels(backends, "bfloat16", "w4a16"))
    assert made.run_as_one is None
    if backends[0].refuses(LinearSpec(16, 16, "nvfp4", "w4a16", "bfloat16", "float32")) is None:
        assert "block 0: qkv is a PreScaled" in caplog.text
    got = PagedRunner(made).run((0, list(range(20))))[0]
    plain = dialects.dialects(model)["plain fp32"].save(tmp_path / "p", model)
    want = PagedRunner(load_model(Checkpoint.open(plain), Kernels([ReferenceBackend()], "float32"))).run(
        (0, list(range(20)))
    )[0]
    # bfloat16 inputs: 2^-9 of each value, through two layers
    assert float((got - want).abs().mean()) <= 0.03 * float(want.std())
