"""AWQ and GPTQ on whole models: folding is exact, fewer errors, ModelOpt's layout, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.quantize import calibrated
from nvfp4_runtime.quantize.awq import fold_into_norm, search
from nvfp4_runtime.quantize.calibrated import Layer, Options, quantize_calibrated
from nvfp4_runtime.quantize.layerwise import SITES, Overlay, Walk, site_modules, windows
from nvfp4_runtime.quantize.pipeline import METHODS, quantize_folder
from nvfp4_runtime.quantize.plan import make_plan
from nvfp4_runtime.quantize.ptq import Job, Source
from nvfp4_runtime.quantize.resume import partial_folder
from server.commands import quantize as command
from tests import tiny
from tests.models.paged import PagedRunner, load_or_skip

TEXT = Path(calibrated.__file__).with_name("calibration.txt").read_text(encoding="utf-8")
TEXTS = [TEXT[:6000]]
MAKERS = {"llama": tiny.llama_config, "qwen2": tiny.qwen2_config, "qwen3": tiny.qwen3_config}


def write_source(folder: Path, kind: str = "llama") -> Path:
    """A tiny model whose inputs have channels of very different size, as real ones do."""
    config = MAKERS[kind](dtype="bfloat16")
    tensors = tiny.random_tensors(config, dtype=torch.float32)
    spread = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(3)))
    for name in tensors:
        if name.endswith("layernorm.weight"):
            tensors[name] *= spread
    return tiny.write_plain(folder, config, {name: t.to(torch.bfloat16) for name, t in tensors.items()})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "src")


def divergence(source: Path, folder: Path) -> float:
    """Mean KL of next-token distributions, quantised to plain: W4A16, float32 arithmetic, tokens not calibrated on."""
    ids = list(TEXT[6000:6400].encode())
    plain, made = (torch.log_softmax(PagedRunner(load_or_skip(f)).run((0, ids))[0], dim=-1) for f in (source, folder))
    return float((plain.exp() * (plain - made)).sum(-1).mean())


def test_with_a_text_models_lose_less(source, tmp_path):
    kl = {}
    for method in ("max", "mse", "awq", "gptq", "awq+gptq"):
        quantize_folder(source, tmp_path / method, method=method, calib_texts=TEXTS, progress=False)
        kl[method] = divergence(source, tmp_path / method)
    assert kl["mse"] < kl["max"]
    assert kl["awq"] < 0.9 * kl["max"]
    assert kl["gptq"] < 0.8 * kl["max"]
    assert kl["awq+gptq"] < 0.8 * kl["max"]


@pytest.mark.parametrize("method", ["awq+gptq", "gptq"])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_layout_is_that_of_the_other_methods_and_loads_without_a_note(tmp_path, kind, method):
    source = write_source(tmp_path / "src", kind)
    for name, options in (("plain", {}), ("made", {"method": method})):
        quantize_folder(source, tmp_path / name, calib_texts=TEXTS, fp8_kv=True, progress=False, **options)
    plain, made = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "made"))
    assert {n: (t.dtype, t.shape) for n, t in plain.items()} == {n: (t.dtype, t.shape) for n, t in made.items()}
    for file in ("config.json", "hf_quant_config.json"):
        assert json.loads((tmp_path / "plain" / file).read_text()) == json.loads((tmp_path / "made" / file).read_text())
    attn = "model.layers.1.self_attn"
    for scale in ("weight_scale_2", "input_scale"):
        assert len({made[f"{attn}.{p}_proj.{scale}"].item() for p in "qkv"}) == 1
    assert not any("pre_quant_scale" in name for name in made)
    ckpt = Checkpoint.open(tmp_path / "made")
    assert ckpt.kv_scales(attn) is not None
    load_or_skip(tmp_path / "made", numerics="w4a4")  # every tensor used
    assert ckpt.notes == ()


def layer_of(source: Path, options: Options) -> Layer:
    class Nowhere:
        def has(self, name: str) -> bool:
            return False

        def write(self, name: str, tensor: torch.Tensor) -> None:
            pass

    opened = Source.open(source)
    walk = Walk(Overlay.over(source), Kernels(available_backends("reference"), "float32"), windows([list(range(200))]))
    job = Job(opened, make_plan(opened.shards, opened.raw_config), True, (), 10**9)
    out: Any = Nowhere()
    return Layer(walk, job, options, out, 0, False)


def test_what_awq_folds_multiplies_out_again(source):
    """Every product of a weight and what came before it is the same as in the plain model."""
    layer = layer_of(source, Options("awq"))
    ckpt, prefix = Checkpoint.open(source), "model.layers.0"
    layer._fold()
    every = {module for site in SITES for module in site_modules(0, site)}
    assert set(layer.columns) == every, "with channels this different every input gains"

    def plain(name: str) -> torch.Tensor:
        return ckpt.tensor(f"{prefix}.{name}.weight").float()

    for norm, modules in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj",)),
    ):
        folded = layer.walk.ckpt.tensor(f"{prefix}.{norm}.weight")
        assert folded.dtype == torch.bfloat16
        assert not torch.equal(folded.float(), plain(norm))
        for module in modules:
            wanted = plain(module) * plain(norm)
            torch.testing.assert_close(layer._plain(f"{prefix}.{module}") * folded.float(), wanted, rtol=1e-6, atol=0)
    up = (layer._plain(f"{prefix}.mlp.up_proj") / layer.columns[f"{prefix}.mlp.up_proj"])[:, 5]
    wanted = plain("mlp.down_proj") * plain("mlp.up_proj")[:, 5]
    torch.testing.assert_close(layer._plain(f"{prefix}.mlp.down_proj") * up, wanted, rtol=1e-6, atol=0)
    v = (layer._plain(f"{prefix}.self_attn.v_proj") / layer.columns[f"{prefix}.self_attn.v_proj"])[:, 9]
    seen = v.reshape(2, 1, 16).expand(2, 2, 16).flatten()  # 4 query heads read 2 value heads
    wanted = plain("self_attn.o_proj") * plain("self_attn.v_proj")[:, 9].reshape(2, 1, 16).expand(2, 2, 16).flatten()
    torch.testing.assert_close(layer._plain(f"{prefix}.self_attn.o_proj") * seen, wanted, rtol=1e-6, atol=0)


def test_a_norm_rounded_after_division_is_made_up_for_by_the_factors():
    norm = torch.tensor([1.0, 0.3, 0.0, 7.0]).to(torch.bfloat16)
    folded, factors = fold_into_norm(norm, torch.tensor([3.0, 0.7, 5.0, 1e-39]))
    assert folded.dtype == torch.bfloat16
    torch.testing.assert_close(folded.float() * factors, norm.float(), rtol=1e-7, atol=0)
    assert factors[2] == factors[3] == 1.0  # a norm of zero, and one that would overflow, stay


def test_the_search_never_does_worse_than_no_factors():
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(32, 64, generator=g), torch.randn(500, 64, generator=g)
    rounding = lambda weights, importance: weights.round()  # noqa: E731
    flat, exponent = search(w, x.t() @ x, lambda weights, importance: weights, None)
    assert exponent == 0.0
    assert torch.equal(flat, torch.ones(64))
    x[:, ::8] *= 30
    factors, exponent = search(w, x.t() @ x, rounding)
    assert exponent > 0
    assert float(factors[::8].min()) > float(factors[1::8].max())
    shared, _ = search(w, x.t() @ x, rounding, torch.arange(64) // 2)
    assert torch.equal(shared[::2], shared[1::2])


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_an_interrupted_run_goes_on_after_the_finished_layers(source, tmp_path, monkeypatch, method):
    options = {"texts": TEXTS, "options": Options(method), "fp8_kv": True, "progress": False}
    quantize_calibrated(source, tmp_path / "whole", **options)
    real, made = Layer._make_site, []

    def interrupted(self, site, inputs):
        made.append((self.layer_id, site))
        if made[-1] == (1, "gate_up") and len(made) < 8:
            raise KeyboardInterrupt
        real(self, site, inputs)

    monkeypatch.setattr(Layer, "_make_site", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_calibrated(source, tmp_path / "out", **options)
    assert partial_folder(tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"method: .* there, awq now"):
        quantize_calibrated(source, tmp_path / "out", **(options | {"options": Options("awq")}))
    made.clear()
    monkeypatch.setattr(
        Layer, "_make_site", lambda self, site, x: made.append((self.layer_id, site)) or real(self, site, x)
    )
    quantize_calibrated(source, tmp_path / "out", **options)
    assert {layer for layer, _ in made} == {1}
    whole, out = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert whole == out


def test_fp8_and_plain_layers_beside_them(source, tmp_path):
    report = quantize_folder(
        source,
        tmp_path / "out",
        method="awq+gptq",
        calib_texts=TEXTS,
        fp8=["*.v_proj", "*.down_proj"],
        exclude=["*.o_proj"],
        progress=False,
    )
    assert (report.algo, report.num_quantized) == ("MIXED_PRECISION", 12)
    out, plain = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", source))
    assert out["model.layers.0.self_attn.v_proj.weight"].dtype == torch.float8_e4m3fn
    # v_proj reads the same input and is no NVFP4, so that input's norm must not be folded into
    assert torch.equal(out["model.layers.0.input_layernorm.weight"], plain["model.layers.0.input_layernorm.weight"])
    assert torch.equal(out["model.layers.0.self_attn.o_proj.weight"], plain["model.layers.0.self_attn.o_proj.weight"])


@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq"])
def test_without_a_text_they_are_refused(source, tmp_path, method):
    with pytest.raises(ConfigError, match="needs a calibration text"):
        quantize_folder(source, tmp_path / "out", method=method, progress=False)


def test_windows_are_spread_evenly_over_the_text():
    ids = list(range(512 * 10 + 7))
    assert [len(w) for w in windows([ids])] == [512] * 10 + [7]
    assert [w[0] // 512 for w in windows([ids], 5)] == [0, 2, 4, 6, 8]
    assert windows([ids[:30]], 5) == [ids[:30]]


def test_the_command_offers_every_method():
    assert command.METHODS == METHODS
