"""Memory plan and limits: what the flags ask for, what the machine has, what a request may use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nvfp4_runtime.checkpoint.eos import eos_token_ids
from nvfp4_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from nvfp4_runtime.engine import plan
from nvfp4_runtime.engine.build import layer_groups
from nvfp4_runtime.engine.plan import (
    check_limits,
    context_limit,
    fit_max_model_len,
    plan_blocks,
    resolve_max_model_len,
)
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.registry import Choice
from nvfp4_runtime.models.hf_config import parse_model_config
from tests.tiny import llama_config

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _one_gib_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "available_memory_bytes", lambda: 1024 * MIB)


def test_available_memory_is_what_the_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    total = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line
    )
    assert 0 < plan.available_memory_bytes() < total


def test_without_flags_a_share_of_free_memory_is_planned() -> None:
    assert plan_blocks(CacheConfig(), SchedulerConfig(), max_len=1 << 20, block_bytes=MIB) == 256


def test_no_more_blocks_than_all_sequences_could_use() -> None:
    assert plan_blocks(CacheConfig(), SchedulerConfig(max_num_seqs=2), max_len=32, block_bytes=MIB) == 1 + 2 * 2


def test_kv_memory_beyond_what_is_free_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"asks for 2\.00 GiB and 1\.00 GiB are free"):
        plan_blocks(CacheConfig(memory_bytes=2048 * MIB), SchedulerConfig(), 32, MIB)


def test_a_cache_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="hold no block"):
        plan_blocks(CacheConfig(memory_bytes=MIB), SchedulerConfig(), 1024, MIB)


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (EngineConfig(scheduler=SchedulerConfig(max_num_seqs=0)), "--max-num-seqs"),
        (EngineConfig(scheduler=SchedulerConfig(max_num_batched_tokens=0)), "--max-num-batched-tokens"),
        (EngineConfig(scheduler=SchedulerConfig(max_queued_requests=-1)), "--max-queued-requests"),
        (EngineConfig(scheduler=SchedulerConfig(max_model_len=-5)), "--max-model-len"),
        (EngineConfig(threads=0), "--threads"),
        (EngineConfig(cache=CacheConfig(num_blocks=1)), "--num-kv-blocks"),
    ],
)
def test_counts_that_no_engine_can_work_with_are_refused_by_name(config: EngineConfig, flag: str) -> None:
    with pytest.raises(ConfigError, match="expected at least") as caught:
        check_limits(config)
    assert caught.value.flag == flag
    check_limits(EngineConfig())


def test_yarn_reaches_beyond_max_position_embeddings(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    config = parse_model_config(llama_config(max_position_embeddings=40960, rope_parameters=yarn))
    assert context_limit(config) == 131072
    assert context_limit(parse_model_config(llama_config())) == 512


def test_context_is_lowered_to_the_cache_unless_it_was_asked_for() -> None:
    assert fit_max_model_len(SchedulerConfig(), 8192, num_blocks=11, block_size=16) == 160
    with pytest.raises(ConfigError, match="holds 160 tokens"):
        fit_max_model_len(SchedulerConfig(max_model_len=8192), 8192, num_blocks=11, block_size=16)


def test_context_beyond_the_models_positions_is_refused() -> None:
    assert resolve_max_model_len(SchedulerConfig(), 2048) == 2048
    assert resolve_max_model_len(SchedulerConfig(max_model_len=100), 2048) == 100
    with pytest.raises(ConfigError, match="2048"):
        resolve_max_model_len(SchedulerConfig(max_model_len=4096), 2048)


def test_like_layers_are_counted_together() -> None:
    alike = [Choice("o_proj", "nvfp4", 4.5, 100, "cpu", "w4a16", "")] * 3
    other = Choice("o_proj", "bf16", 16.0, 400, "cpu", "dense", "")
    groups = layer_groups([alike[0], other, *alike[1:]])
    assert [(g.name, g.stored, g.count, g.num_bytes) for g in groups] == [
        ("o_proj", "nvfp4", 3, 300),
        ("o_proj", "bf16", 1, 400),
    ]


@pytest.mark.parametrize(("declared", "expected"), [(None, [2]), (5, [2, 5]), ([2, 7], [2, 7])])
def test_generation_config_adds_its_end_tokens(tmp_path: Path, declared: object, expected: list[int]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
    assert eos_token_ids(tmp_path, [2]) == expected


def test_the_tokenizers_end_token_ends_generations_too(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 9, "content": "<|im_end|>"}]}))
    assert eos_token_ids(tmp_path, [2]) == [2, 9]


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (EngineConfig("m", threads=100_000), "--threads"),
        (EngineConfig("m", seed=10**23), "--seed"),
        (EngineConfig("m", cache=CacheConfig(num_blocks=8, memory_bytes=1 << 20)), "--num-kv-blocks"),
    ],
)
def test_counts_no_machine_works_with_are_refused(config: EngineConfig, flag: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_limits(config)
    assert refused.value.flag == flag
