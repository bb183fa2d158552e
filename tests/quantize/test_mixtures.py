"""Mixtures: each expert is measured and made on the tokens that it is sent, from single matrices or stacks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.models import load_model
from nvfp4_runtime.nvfp4.weight import NVFP4Weight
from nvfp4_runtime.quantize.calibrate import calibrate, tokenize
from nvfp4_runtime.quantize.layerwise import LayerRun, Overlay, Walk, windows
from nvfp4_runtime.quantize.pipeline import quantize_folder
from tests import tiny

TEXTS = ["The quick brown fox jumps over the lazy dog, which sleeps. " * 12]
CONFIGS = {
    # 48: twice that is not the hidden size, so that a stack's order can be told
    "glm4_moe": tiny.glm4_moe_config(dtype="bfloat16", moe_intermediate_size=48),
    "qwen2_moe": tiny.qwen2_moe_config(dtype="bfloat16"),
    "mixtral": tiny.mixtral_config(dtype="bfloat16"),
}
LONELY = 3  # no token is sent to this expert of the glm4_moe model


def write(folder: Path, name: str, stacked: bool = False) -> Path:
    config = CONFIGS[name]
    tensors = tiny.random_tensors(config, seed=4, dtype=torch.bfloat16)
    for key, tensor in tensors.items():
        if key.endswith("e_score_correction_bias"):
            tensor[LONELY] = -100.0
    return tiny.write_plain(folder, config, stack(tensors) if stacked else tensors)


def stack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All experts of a layer and projection as one tensor, as transformers has them in memory."""
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    rest = {}
    for name, tensor in tensors.items():
        prefix, found, tail = name.partition(".experts.")
        if not found:
            rest[name] = tensor
            continue
        number, leaf, _ = tail.split(".")
        experts.setdefault(f"{prefix}.experts", {}).setdefault(int(number), {})[leaf] = tensor
    for prefix, each in experts.items():
        ups = [torch.cat([each[e]["gate_proj"], each[e]["up_proj"]]) for e in sorted(each)]
        rest[f"{prefix}.gate_up_proj"] = torch.stack(ups)
        rest[f"{prefix}.down_proj"] = torch.stack([each[e]["down_proj"] for e in sorted(each)])
    return rest


def test_each_expert_has_the_scale_of_its_own_tokens_and_one_without_has_its_layers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path, "glm4_moe")
    with caplog.at_level(logging.WARNING):
        measured = calibrate(folder, TEXTS, backend="reference", progress=False)
    layers = [i for i in range(2) if f"model.layers.{i}.mlp.experts.0.gate_proj" in measured.input_scales]
    assert measured.unreached == len(layers) > 0
    assert f"{measured.unreached} expert(s) were sent no token" in caplog.text
    for i in layers:
        for leaf in ("gate_proj", "down_proj"):
            names = [f"model.layers.{i}.mlp.experts.{e}.{leaf}" for e in range(8)]
            scales = [measured.input_scales[name] for name in names]
            shared = measured.input_scales[f"model.layers.{i}.mlp.shared_experts.{leaf}"]
            assert scales[LONELY] == max(*scales, shared)
            assert len(set(scales)) > 2


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_walk_gives_an_expert_is_what_the_router_sends_it(tmp_path: Path, name: str) -> None:
    walk = Walk(
        Overlay.over(write(tmp_path, name)),
        Kernels(available_backends("reference"), "float32"),
        windows([list(range(100)), list(range(50, 90))]),
    )
    moe = walk.config.moe
    assert moe is not None
    for layer_id in range(2):
        run = LayerRun(walk, layer_id)
        if not moe.layers[layer_id]:
            run.through()
            continue
        for site in ("qkv", "o", "gate_up"):
            run.to(site)
        mixture: Any = walk.build(layer_id).mlp
        (step,) = walk.steps
        x, (_, chosen) = step.h.clone(), mixture.router(step.h)
        seen = [each.take() for each in run.inputs("gate_up")][-moe.num_experts :]
        for e, rows in enumerate(seen):
            wanted = [x[t] for t in range(len(x)) if e in chosen[t].tolist()]
            assert len(wanted) == sum(map(len, rows))
            if wanted:
                assert torch.equal(torch.cat(rows), torch.stack(wanted))
        run.to("down")
        assert (
            sum(len(part) for each in run.inputs("down")[-moe.num_experts :] for part in each.take()) == chosen.numel()
        )
        run.end()
        torch.testing.assert_close(walk.steps[0].x, mixture(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["max", "gptq"])
def test_stacks_give_the_same_folder_as_single_matrices(tmp_path: Path, method: Any) -> None:
    made = []
    for stacked in (False, True):
        folder, out = write(tmp_path / f"src{stacked}", "glm4_moe", stacked), tmp_path / f"out{stacked}"
        if stacked:
            assert load_file(folder / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj"].dim() == 3
        quantize_folder(folder, out, method=method, calib_texts=TEXTS, fp8_kv=True, progress=False)
        made.append(load_file(out / "model.safetensors"))
    assert made[0].keys() == made[1].keys()
    for name, tensor in made[0].items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), made[1][name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("name", CONFIGS)
def test_gptq_of_experts_spoils_what_they_give_less_than_rounding(tmp_path: Path, name: str) -> None:
    """Squared errors of what all experts of the first mixture give, on the rows that the plain model sends each."""
    folder = write(tmp_path / "src", name)
    sequences = windows(tokenize(folder, TEXTS))
    walk = Walk(Overlay.over(folder), Kernels(available_backends("auto"), "float32"), sequences)
    moe = walk.config.moe
    assert moe is not None
    first = moe.layers.index(True)
    for layer_id in range(first):
        LayerRun(walk, layer_id).through()
    run = LayerRun(walk, first)
    for site in ("qkv", "o", "gate_up"):
        run.to(site)
    inputs = [(each.modules, each.take()) for each in run.inputs("gate_up")]
    errors: dict[str, float] = {}
    for method in ("mse", "gptq", "awq+gptq"):
        report = quantize_folder(folder, tmp_path / method, method=method, calib_texts=TEXTS, progress=False)  # type: ignore[arg-type]
        assert report.algo == "NVFP4"
        made = Checkpoint.open(tmp_path / method)
        errors[method] = 0.0
        for modules, rows in inputs:
            for module in modules if rows else ():
                plain = walk.ckpt.tensor(f"{module}.weight").float()
                weight = made.linear(module, *plain.shape)
                assert isinstance(weight, NVFP4Weight)
                assert weight.input_scale is not None
                errors[method] += float((torch.cat(rows).float() @ (weight.dequantize() - plain).t()).square().sum())
    assert errors["gptq"] < 0.8 * errors["mse"]
    assert errors["awq+gptq"] < 0.8 * errors["mse"]
    ckpt = Checkpoint.open(tmp_path / "gptq")
    load_model(ckpt, Kernels(available_backends("auto"), "bfloat16", "w4a4"), "bfloat16")  # every expert has a scale
    assert ckpt.notes == ()


def test_an_expert_without_tokens_is_still_rounded_to_its_own_weights(tmp_path: Path) -> None:
    folder = write(tmp_path / "src", "glm4_moe")
    quantize_folder(folder, tmp_path / "out", method="gptq", calib_texts=TEXTS, progress=False)
    name = f"model.layers.1.mlp.experts.{LONELY}.down_proj"
    plain = Checkpoint.open(folder).tensor(f"{name}.weight").float()
    made = Checkpoint.open(tmp_path / "out").linear(name, *plain.shape)
    assert isinstance(made, NVFP4Weight)
    assert float((made.dequantize() - plain).norm() / plain.norm()) < 0.2


def test_a_bits_budget_is_refused_for_experts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this model's are experts"):
        quantize_folder(
            write(tmp_path / "src", "mixtral"), tmp_path / "out", bits_budget=5.0, calib_texts=TEXTS, progress=False
        )
