"""Families on native kernels: tokens and logprobs to the last bit, alone, in a batch, chunked, preempted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nvfp4_runtime import LLM, SamplingParams
from nvfp4_runtime.llm import Generation
from tests import tiny, tiny_families

FAMILIES = {
    "qwen3": tiny.qwen3_config(),
    "mixtral": tiny.mixtral_config(),
    "qwen2_moe": tiny.qwen2_moe_config(),
    "glm4_moe": tiny.glm4_moe_config(),
    "deepseek_v3": tiny.deepseek_v3_config(),
    "gpt_oss": tiny_families.gpt_oss_config(),
    "gemma4": tiny_families.gemma4_config(),
    "qwen3_next": tiny_families.qwen3_next_config(),
    "nemotron_h": tiny.nemotron_h_config(),
}
PROMPTS = [[7] * 3, list(range(10, 50)), [300, 5, 9], list(range(10, 45)), [1], list(range(200, 263))]
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, min_tokens=12, logprobs=0)
WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "chunked": {"max_num_batched_tokens": 16},
    "preempted": {"num_blocks": 9, "max_model_len": 96, "max_num_batched_tokens": 48},
}


def bits(results: list[Generation]) -> list[tuple[list[int], list[float]]]:
    return [(r.token_ids, [entry.logprob for entry in r.logprobs]) for r in results]


@pytest.mark.parametrize("family", FAMILIES)
def test_company_and_cutting_change_no_bit(tmp_path: Path, family: str) -> None:
    config = {**FAMILIES[family], "dtype": "bfloat16"}
    folder = tiny.write_modelopt(tmp_path, config, tiny.random_tensors(config, seed=8), share_scale_2=False)

    def load(**options: Any) -> LLM:
        llm = LLM(folder, numerics="w4a16", **{"num_blocks": 65, **options})
        if any(group.backend == "reference" for group in llm.info.layers):
            pytest.skip("the plain kernels are not batch invariant: build the extension (backend cpu)")
        return llm

    alone = load(enable_prefix_caching=False)
    expected = [bits(alone.generate([prompt], PARAMS))[0] for prompt in PROMPTS]
    for way, options in WAYS.items():
        llm = load(**options)
        assert bits(llm.generate(PROMPTS, PARAMS)) == expected, way
        assert bits(llm.generate(PROMPTS, PARAMS)) == expected, f"{way}, again"
        assert (llm.engine.scheduler.num_preemptions > 0) == (way == "preempted")
