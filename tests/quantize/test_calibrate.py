"""Calibration measures what the layers see: compared with hooks on a transformers model of the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.errors import CheckpointError, ConfigError
from nvfp4_runtime.quantize.calibrate import calibrate, tokenize
from nvfp4_runtime.quantize.layerwise import WINDOW, largest_input
from nvfp4_runtime.quantize.pipeline import quantize_folder
from tests import tiny

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 3, "def f(x):\n    return x + 1\n", ""]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = tiny.llama_config(dtype="bfloat16")
    return tiny.write_plain(tmp_path / "src", config, tiny.random_tensors(config, dtype=torch.bfloat16))


def test_input_and_kv_scales_are_those_that_transformers_sees(source):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    amax: dict[str, float] = {}

    def watch(name):
        def hook(module, args, output):
            amax[name] = max(amax.get(name, 0.0), args[0].abs().max().item())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(watch(name))
    kv = {}
    for ids in tokenize(source, TEXTS):
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
        for i, layer in enumerate(cache.layers):
            k, v = kv.get(i, (0.0, 0.0))
            kv[i] = (max(k, layer.keys.abs().max().item()), max(v, layer.values.abs().max().item()))
    measured = calibrate(source, TEXTS, backend="reference", progress=False)
    # lm_head sees only the last token here, so only the layers are compared
    layers = {name: value for name, value in amax.items() if name != "lm_head"}
    assert layers.keys() == measured.input_scales.keys() - {"lm_head"}
    # ours runs in BF16 (8 bits): each of about ten roundings on the way moves a value by 2^-9 of itself
    for name, value in layers.items():
        assert measured.input_scales[name] * 2688 == pytest.approx(value, rel=10 * 2**-8), name
    for i, (k, v) in kv.items():
        ours = measured.kv_scales[f"model.layers.{i}.self_attn"]
        assert ours == (pytest.approx(k / 448, rel=10 * 2**-8), pytest.approx(v / 448, rel=10 * 2**-8))


def test_fused_layers_see_one_input_and_every_token_is_counted(source):
    measured = calibrate(source, TEXTS, backend="reference", progress=False)
    attn = "model.layers.1.self_attn"
    assert len({measured.input_scales[f"{attn}.{p}_proj"] for p in "qkv"}) == 1
    assert measured.num_tokens == sum(len(ids) for ids in tokenize(source, TEXTS))


def test_texts_longer_than_a_window_are_cut_and_wholly_used(source):
    text = "abcdefgh" * (WINDOW // 8) + "tail of the text"
    measured = calibrate(source, [text], backend="reference", progress=False)
    assert measured.num_tokens == len(text)


def test_a_calibrated_folder_declares_nvfp4_with_every_input_scale_and_fp8_kv(source, tmp_path):
    out = tmp_path / "out"
    report = quantize_folder(source, out, calib_texts=TEXTS, fp8_kv=True, backend="reference", progress=False)
    assert (report.algo, report.kv_algo) == ("NVFP4", "FP8")
    measured = calibrate(source, TEXTS, backend="reference", progress=False)
    ckpt = Checkpoint.open(out)
    weight = ckpt.linear("model.layers.1.mlp.down_proj", 64, 96)
    expected = measured.input_scales["model.layers.1.mlp.down_proj"]
    assert weight.input_scale == torch.tensor(expected, dtype=torch.float32).item()
    assert ckpt.kv_scales("model.layers.0.self_attn") == pytest.approx(
        measured.kv_scales["model.layers.0.self_attn"], rel=2**-23
    )


def test_texts_without_tokens_and_folders_without_tokenizer_are_refused(source):
    with pytest.raises(ConfigError, match="has no tokens"):
        calibrate(source, ["", ""], progress=False)
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        calibrate(source, ["a"], progress=False)


def test_an_activation_that_is_not_finite_is_refused_naming_the_layers():
    modules = ("a.q_proj", "a.k_proj")
    assert largest_input([torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 0.0]])], modules) == 3.0
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(CheckpointError, match=r"input of a\.q_proj, a\.k_proj holds NaN or Inf"):
            largest_input([torch.tensor([[1.0, -3.0]]), torch.tensor([[1.0, bad]])], modules)
