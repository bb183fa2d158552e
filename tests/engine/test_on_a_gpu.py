"""What only a GPU can show: captured launches, pinned copies and measured memory. Skipped where there is none."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nvfp4_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from nvfp4_runtime.engine.build import build_engine
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.overlap import OverlappedEngine
from tests.engine.helpers import run_to_end, submit, tokens_of
from tests.tiny import tiny_nvfp4_llama

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return EngineConfig(
        model=str(tiny_nvfp4_llama(tmp_path_factory.mktemp("tiny") / "model")),
        device="cuda",
        cache=CacheConfig(gpu_memory_utilization=0.2),
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=128),
    )


@pytest.fixture(scope="module")
def engine(config: EngineConfig) -> Engine:
    return build_engine(config)


def tokens_by_name(engine: Engine, num_requests: int, **params: object) -> dict[str, list[int]]:
    for i in range(num_requests):
        engine.add(submit(f"r{i}", [3 + i, 1, 4, 1, 5], 24, ignore_eos=True, **params))
    return {name: tokens_of(outputs) for name, outputs in run_to_end(engine).items()}


def test_start_up_says_where_it_runs_and_how(engine: Engine) -> None:
    assert isinstance(engine, OverlappedEngine)
    assert torch.cuda.get_device_name(0) in engine.info.device
    assert {"upload", "warm_up", "kv_cache", "capture"} <= set(engine.info.startup_seconds)
    how = {group.name: group for group in engine.info.layers}
    assert how["decode step"].backend == "cuda graph", how["decode step"].reason


def test_the_cache_stays_within_the_share(engine: Engine) -> None:
    free, total = torch.cuda.mem_get_info()
    assert engine.info.kv_bytes <= 0.2 * total
    assert free > 0.7 * total


# one size each, so that no row is padding: the kernels may round otherwise where a batch is larger
@pytest.mark.parametrize("num_requests", [1, 4, 16])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 11}])
def test_captured_steps_give_the_tokens_of_steps_run_op_by_op(
    config: EngineConfig, engine: Engine, num_requests: int, params: dict[str, object]
) -> None:
    plain = build_engine(dataclasses.replace(config, cuda_graphs=False))
    assert tokens_by_name(engine, num_requests, **params) == tokens_by_name(plain, num_requests, **params)


def test_padding_and_company_leave_a_request_alone(engine: Engine) -> None:
    alone = tokens_by_name(engine, 1)["r0"]
    assert len(alone) == 24
    for num_requests in (3, 5, 11):
        found = tokens_by_name(engine, num_requests)
        assert all(len(tokens) == 24 for tokens in found.values())
    assert engine.scheduler.pool.num_used == 0


def test_nothing_is_allocated_outside_the_pools_while_decoding(engine: Engine) -> None:
    engine.add(submit("r", [1, 2, 3], 100, ignore_eos=True))
    for _ in range(10):
        engine.step()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    for _ in range(60):
        engine.step()
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
    run_to_end(engine)
