"""Whole-engine greedy output of tiny models equals transformers' `generate`, whatever the scheduler does to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4_runtime.config import CacheConfig, EngineConfig, KVDtype, SchedulerConfig
from nvfp4_runtime.engine.build import build_engine
from nvfp4_runtime.engine.runner import ModelRunner
from nvfp4_runtime.errors import KernelError
from tests import tiny, tiny_families
from tests.engine.helpers import run_to_end, submit, tokens_of
from tests.tiny import tiny_llama, tiny_nvfp4_llama

NEW_TOKENS = 12
PROMPTS = [[7] * 3, list(range(10, 50)), [300, 5, 9], list(range(10, 45)), [1], list(range(200, 263))]


FAMILIES = {
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
    "gemma3": tiny_families.gemma3_config(),
    "deepseek_v3, one query projection": tiny.deepseek_v3_config(q_lora_rank=None),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A plain float32 model folder and transformers' greedy continuation of each prompt."""
    transformers = pytest.importorskip("transformers")
    config = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny.write_plain(folder, config, tiny.random_tensors(config, seed=3), shards=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for prompt in PROMPTS:
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        )
        expected.append(ids[0, len(prompt) :].tolist())
    return folder, expected


CONFIGS: dict[str, dict[str, Any]] = {
    "one batch": {},
    "chunked prefill": {"max_num_batched_tokens": 16},
    "one at a time": {"max_num_seqs": 1},
    "preempted": {"num_blocks": 9, "max_model_len": 96, "max_num_batched_tokens": 48},
    "without prefix caching": {"enable_prefix_caching": False},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_transformers(case: tuple[Path, list[list[int]]], name: str) -> None:
    folder, expected = case
    options = dict(CONFIGS[name])
    cache = {k: options.pop(k) for k in list(options) if k in CacheConfig.__dataclass_fields__}
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        cache=CacheConfig(**{"num_blocks": 65, **cache}),
        scheduler=SchedulerConfig(**options),
    )
    engine = build_engine(config)
    # transformers never stops early here (min_new_tokens masks EOS), so neither may we
    params = {"max_tokens": NEW_TOKENS, "min_tokens": NEW_TOKENS}
    for i, prompt in enumerate(PROMPTS):
        engine.add(submit(f"r{i}", prompt, **params))
    outputs = run_to_end(engine)
    assert [tokens_of(outputs[f"r{i}"]) for i in range(len(PROMPTS))] == expected
    assert (engine.scheduler.num_preemptions > 0) == (name == "preempted")
    assert engine.scheduler.pool.num_used == 0


def test_a_row_that_is_not_finite_ends_its_own_request_only(tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(tiny_nvfp4_llama(tmp_path / "m")), dtype="float32", cache=CacheConfig(num_blocks=65)
    )
    healthy = build_engine(config)
    healthy.add(submit("good", [1, 2, 3], 6))
    expected = tokens_of(run_to_end(healthy)["good"])

    engine = build_engine(config)
    assert isinstance(engine.executor, ModelRunner)
    # K and V of the victim's first block become NaN after its prefill
    engine.add(submit("bad", [9, 8, 7], 6))
    engine.step()
    victim = engine.scheduler.requests["bad"].block_ids[0]
    for layer in engine.executor._kv:
        layer.v[victim] = float("nan")
    engine.add(submit("good", [1, 2, 3], 6))
    outputs = run_to_end(engine)
    assert outputs["bad"][-1].finish_reason == "error"
    assert "not finite" in (outputs["bad"][-1].error or "")
    assert tokens_of(outputs["good"]) == expected
    assert engine.scheduler.pool.num_used == 0
    # freed blocks come back with whatever they held: nobody may read what it did not write
    for layer in engine.executor._kv:
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    engine.scheduler.enable_prefix_caching = False
    engine.add(submit("next", [1, 2, 3], 6))
    assert tokens_of(run_to_end(engine)["next"]) == expected


def test_prompt_logprobs_equal_log_softmax_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tiny_llama(tmp_path / "m", seed=5)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = list(range(30, 90))
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0].double(), dim=-1)
    engine = build_engine(
        EngineConfig(
            model=str(folder),
            dtype="float32",
            cache=CacheConfig(num_blocks=33),
            scheduler=SchedulerConfig(max_num_batched_tokens=25),
        )
    )
    engine.add(submit("r", prompt, 1, prompt_logprobs=3))
    scores = [s for output in run_to_end(engine)["r"] for s in output.prompt_logprobs or []]
    assert scores[0] is None
    assert len(scores) == len(prompt)
    for position, score in enumerate(scores[1:], start=1):
        assert score is not None
        row = expected[position - 1]
        assert score.token_id == prompt[position]
        # float32 logits of magnitude ~10 carry about 1e-5
        assert score.logprob == pytest.approx(float(row[prompt[position]]), abs=1e-4)
        assert [token for token, _ in score.top] == row.topk(3).indices.tolist()


def test_a_prompt_of_one_token_has_no_logprob_and_says_so(tmp_path: Path) -> None:
    engine = build_engine(EngineConfig(model=str(tiny_llama(tmp_path / "m")), cache=CacheConfig(num_blocks=9)))
    engine.add(submit("r", [5], 2, prompt_logprobs=1))
    assert [s for output in run_to_end(engine)["r"] for s in output.prompt_logprobs or []] == [None]


def test_sampling_depends_on_the_seed_and_not_on_the_company(tmp_path: Path) -> None:
    config = EngineConfig(model=str(tiny_llama(tmp_path / "m")), dtype="float32", cache=CacheConfig(num_blocks=65))
    engine = build_engine(config)
    for i in range(6):
        engine.add(submit(f"r{i}", [3, 1, 4], 10, temperature=1.0, seed=i))
    together = {name: tokens_of(outputs) for name, outputs in run_to_end(engine).items()}
    for i in range(6):
        engine.add(submit("single", [3, 1, 4], 10, temperature=1.0, seed=i))
        assert tokens_of(run_to_end(engine)["single"]) == together[f"r{i}"]
    assert len({tuple(tokens) for tokens in together.values()}) > 1


@pytest.mark.parametrize("kv_dtype", ["fp8", "nvfp4"])
def test_a_narrow_cache_gives_the_same_tokens_whatever_the_schedule_and_is_named(
    tmp_path: Path, kv_dtype: KVDtype
) -> None:
    folder = tiny_nvfp4_llama(tmp_path / "m", kv_scales=(0.02, 0.02))
    outputs = []
    for name in ("one batch", "chunked prefill", "preempted"):
        options = dict(CONFIGS[name])
        cache = CacheConfig(num_blocks=options.pop("num_blocks", 65), kv_dtype=kv_dtype)
        config = EngineConfig(model=str(folder), cache=cache, scheduler=SchedulerConfig(**options), backend="cpu")
        try:
            engine = build_engine(config)
        except KernelError as error:
            pytest.skip(str(error))
        assert engine.info.kv_dtype == kv_dtype
        for i, prompt in enumerate(PROMPTS):
            engine.add(submit(f"r{i}", prompt, NEW_TOKENS))
        outputs.append({request: tokens_of(found) for request, found in run_to_end(engine).items()})
    assert outputs[0] == outputs[1] == outputs[2]
    assert all(outputs[0].values())
