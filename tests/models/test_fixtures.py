"""Checkpoints written by NVIDIA's and llm-compressor's own tools, judged as their READMEs say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nvfp4_runtime.config import KVDtype, Numerics
from tests.models.paged import BACKENDS, PagedRunner, load_or_skip

FIXTURES = Path(__file__).parents[2] / "../shared/fixtures"
KVFP8, EXCLUDED = "modelopt-llama-nvfp4-kvfp8", "modelopt-llama-nvfp4-excluded"
COMPRESSED = "llmcompressor-llama-nvfp4"
# a step whose two best logits lie closer than this may go either way: twice the logits' tolerance
DECIDED = 2e-4


def reference(name: str) -> dict[str, Tensor]:
    folder = FIXTURES / name
    if not folder.is_dir():
        pytest.skip(f"../shared/fixtures/{name} is not beside this repository")
    return load_file(folder / "reference/reference.safetensors")


def logits(name: str, backend: str, numerics: Numerics, kv_dtype: KVDtype, ids: Tensor) -> Tensor:
    model = load_or_skip(FIXTURES / name, backend, numerics=numerics, kv_dtype=kv_dtype)
    return PagedRunner(model).run((0, ids[0].tolist()))[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prompt", ["prompt", "long"])
@pytest.mark.parametrize("name", [KVFP8, EXCLUDED, COMPRESSED])
def test_weight_only_logits_agree_to_1e_4(name: str, prompt: str, backend: str) -> None:
    expected = reference(name)
    found = logits(name, backend, "w4a16", "float32", expected[f"input_ids.{prompt}"])
    torch.testing.assert_close(found, expected[f"logits.weight_only.{prompt}"][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prompt", ["prompt", "long"])
@pytest.mark.parametrize(
    ("name", "mode", "kv_dtype"),
    [
        (KVFP8, "act_quant", "float32"),
        (KVFP8, "act_quant_kv_quant", "fp8"),
        (EXCLUDED, "act_quant", "float32"),
        (COMPRESSED, "act_quant", "float32"),
    ],
)
def test_w4a4_logits_agree_on_average_and_in_argmax(
    name: str, mode: str, kv_dtype: KVDtype, prompt: str, backend: str
) -> None:
    """Chaotic at rounding boundaries: single logits may move by 0.4, the mean by far less than a wrong scale would."""
    expected = reference(name)
    found = logits(name, backend, "w4a4", kv_dtype, expected[f"input_ids.{prompt}"])
    want = expected[f"logits.{mode}.{prompt}"][0]
    assert float((found - want).abs().mean()) <= 0.1
    agree = (found.argmax(-1) == want.argmax(-1)).double().mean()
    assert float(agree) >= 0.9
    # and it is this mode, not the weight-only one, that the result lies near
    other = expected[f"logits.weight_only.{prompt}"][0]
    assert float((found - want).abs().mean()) < 0.5 * float((other - want).abs().mean())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [KVFP8, EXCLUDED, COMPRESSED])
def test_greedy_tokens_agree_wherever_the_choice_is_clear(name: str, backend: str) -> None:
    expected = reference(name)
    tokens = expected["greedy_tokens.weight_only.prompt"].flatten().tolist()
    margins = expected["greedy_margin.weight_only.prompt"].flatten().tolist()
    clear = next((i for i, margin in enumerate(margins) if margin < DECIDED), len(tokens))
    assert clear >= 8  # else this shows nothing
    runner = PagedRunner(load_or_skip(FIXTURES / name, backend))
    found = runner.greedy(0, expected["input_ids.prompt"][0].tolist(), clear)
    assert found == tokens[:clear]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_with_fp8_cache_stays_near_the_weight_only_logits(backend: str) -> None:
    """How such a checkpoint is served: W4A16, bfloat16 activations, FP8 cache.

    E4M3 moves keys and values by up to 1/16, bfloat16 everything by 1/256; logits have a standard deviation of 1.8.
    """
    expected = reference(KVFP8)
    want = expected["logits.weight_only.long"][0]
    model = load_or_skip(FIXTURES / KVFP8, backend, "bfloat16", kv_dtype="fp8")
    found = PagedRunner(model).run((0, expected["input_ids.long"][0].tolist()))[0]
    assert float((found - want).abs().mean()) <= 0.02 * float(want.std())
    assert float((found.argmax(-1) == want.argmax(-1)).double().mean()) >= 0.9


def test_kv_scales_of_the_checkpoint_reach_the_cache_specs() -> None:
    reference(KVFP8)
    model = load_or_skip(FIXTURES / KVFP8)
    assert all(spec.has_scales and spec.k_scale != 1.0 and spec.v_scale != 1.0 for spec in model.kv_specs)
    assert not any(spec.has_scales for spec in load_or_skip(FIXTURES / EXCLUDED).kv_specs)
