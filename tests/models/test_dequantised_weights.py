"""Every family in ModelOpt's NVFP4 names, W4A16: the logits of transformers on the dequantised weights, in float32.

Tolerance 1e-4: two layers of float32 arithmetic in different summation orders on logits of order 1.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny, tiny_families
from tests.models.paged import BACKENDS, PagedRunner, load_or_skip

transformers = pytest.importorskip("transformers")

CONFIGS = {
    "llama": tiny.llama_config(),
    "qwen2": tiny.qwen2_config(),
    "qwen3": tiny.qwen3_config(),
    "mixtral": tiny.mixtral_config(),
    "qwen2_moe": tiny.qwen2_moe_config(),
    "qwen3_moe": tiny.qwen3_moe_config(),
    "glm4_moe": tiny.glm4_moe_config(),
    "glm4_moe_lite": tiny.glm4_moe_lite_config(),
    "deepseek_v3": tiny.deepseek_v3_config(),
    "nemotron_h": tiny.nemotron_h_config(),
    "gpt_oss": tiny_families.gpt_oss_config(),
    "gemma4": tiny_families.gemma4_config(),
    "minimax_m2": tiny_families.minimax_m2_config(),
    "qwen3_next": tiny_families.qwen3_next_config(),
    "qwen3_5": tiny_families.qwen3_5_config(),
    "gemma3": tiny_families.gemma3_config(),
    "phi3": tiny_families.phi3_config(),
    "ministral3": tiny_families.ministral3_config(),
    "deepseek_v3, one query projection": tiny.deepseek_v3_config(q_lora_rank=None),
}
dequantised = tiny.unpack  # of this test's kind, for others that compare as it does
PROMPT = torch.randint(0, 320, (70,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A sharded NVFP4 checkpoint whose fused parts have tensor scales of their own, and the logits it must give."""
    config = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp("family")
    tensors = tiny.random_tensors(config, seed=5)
    tiny.write_modelopt(folder / "nvfp4", config, tensors, share_scale_2=False, shards=3)
    packed = tiny.pack_tensors(tensors, ("lm_head", "model.embed_tokens"), 0.01, None, share_scale_2=False)
    assert sum(name.endswith("weight_scale_2") for name in packed) > 7
    tiny.write_plain(folder / "plain", config, tiny.unpack(packed))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.float32)
    with torch.no_grad():
        return folder / "nvfp4", model(torch.tensor([PROMPT]), use_cache=False).logits[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_only_logits_are_those_of_the_dequantised_weights(case: tuple[Path, torch.Tensor], backend: str) -> None:
    folder, expected = case
    runner = PagedRunner(load_or_skip(folder, backend))
    found = torch.cat([runner.run((0, piece))[0] for piece in (PROMPT[:33], PROMPT[33:34], PROMPT[34:])])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
