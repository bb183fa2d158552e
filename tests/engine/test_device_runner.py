"""The GPU's way through start-up and steps, with real models and the CPU in the GPU's place: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from nvfp4_runtime.engine import load
from nvfp4_runtime.engine.build import build_engine
from nvfp4_runtime.engine.device import Device
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.gpu import Gpu
from nvfp4_runtime.engine.phases import Phases
from nvfp4_runtime.engine.scheduler import Scheduler
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.models import describe_model, load_model
from tests import tiny
from tests.engine.helpers import run_to_end, submit, tokens_of
from tests.engine.twin import TwinDevice
from tests.tiny import tiny_nvfp4_llama, tiny_qwen3

PROMPTS = [[7] * 3, list(range(10, 50)), [300, 5, 9], list(range(10, 45)), [1], list(range(200, 263))]


class TwinMemory:
    """Plenty, of which nothing is ever taken."""

    total = 1 << 31

    def free(self) -> int:
        return self.total

    def peak(self, work: Callable[[], object]) -> int:
        work()
        return 0


class TwinGpu(Gpu):
    def __init__(self, lag: str) -> None:
        self.device, self.memory, self.free = torch.device("cpu"), TwinMemory(), TwinMemory.total
        self._lag = lag
        self.twins: list[TwinDevice] = []

    def stream(self) -> Device:
        self.twins.append(TwinDevice(self._lag, seed=len(self.twins)))
        return self.twins[-1]


def on_twin(
    config: EngineConfig, plain: Engine, lag: str = "random"
) -> tuple[Engine, TwinGpu, Kernels, Phases, list[tuple[str, float]]]:
    """`config` as build_engine would start it on a GPU, and what start-up left behind."""
    checkpoint = Checkpoint.open(config.model)
    dtype = load.resolve_dtype(config, describe_model(checkpoint.raw_config).dtype)
    kernels = Kernels(available_backends("auto", config.threads), dtype)
    model = load_model(checkpoint, kernels, config.cache.kv_dtype, plain.info.max_model_len)
    progress: list[tuple[str, float]] = []
    phases, gpu = Phases(lambda name, fraction: progress.append((name, fraction))), TwinGpu(lag)
    placed = gpu.place(config, model, plain.info.max_model_len, phases, kernels)
    assert (placed.num_blocks, placed.max_len) == (plain.info.num_blocks, plain.info.max_model_len)
    old = plain.scheduler
    pool = type(old.pool)(placed.num_blocks)
    scheduler = Scheduler(old.config, pool, old.block_size, old.enable_prefix_caching, old.num_state_slots)
    return placed.make(scheduler=scheduler, info=plain.info), gpu, kernels, phases, progress


CONFIGS: dict[str, dict[str, Any]] = {
    "one batch": {},
    "chunked prefill": {"max_num_batched_tokens": 16},
    "preempted": {"num_blocks": 9, "max_model_len": 96, "max_num_batched_tokens": 48},
    "without prefix caching": {"enable_prefix_caching": False},
    "op by op": {"cuda_graphs": False},
}


def config_of(folder: Path, name: str) -> EngineConfig:
    options = dict(CONFIGS[name])
    cache = {k: options.pop(k) for k in list(options) if k in CacheConfig.__dataclass_fields__}
    graphs = options.pop("cuda_graphs", True)
    scheduler = SchedulerConfig(**({"max_num_seqs": 6, "max_num_batched_tokens": 128} | options))
    return EngineConfig(
        model=str(folder), cuda_graphs=graphs, cache=CacheConfig(**({"num_blocks": 65} | cache)), scheduler=scheduler
    )


def native_engine(config: EngineConfig) -> Engine:
    """Today's engine over kernels that are batch invariant and may be captured; skips where they are not built."""
    engine = build_engine(config)
    if {group.backend for group in engine.info.layers} != {"cpu"}:
        pytest.skip("the plain kernels are neither batch invariant nor captured: build the extension (backend cpu)")
    return engine


def add_all(engine: Engine) -> None:
    for i, prompt in enumerate(PROMPTS):
        engine.add(submit(f"greedy{i}", prompt, 12, ignore_eos=True))
        engine.add(submit(f"drawn{i}", prompt, 9 + i, temperature=1.0, top_p=0.95, seed=i, ignore_eos=True))
    engine.add(submit("scored", PROMPTS[3], 5, logprobs=1, prompt_logprobs=1, ignore_eos=True))


def tiny_hybrid(folder: Path) -> Path:
    """Nemotron-H: states in slots beside its blocks, in captured steps and others."""
    config = tiny.nemotron_h_config()
    return tiny.write_plain(folder, config, tiny.random_tensors(config, seed=4))


@pytest.fixture(
    scope="module", params=[tiny_nvfp4_llama, tiny_qwen3, tiny_hybrid], ids=["nvfp4 llama", "qwen3", "nemotron_h"]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = request.param(tmp_path_factory.mktemp("tiny") / "model")
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_and_logprobs_are_the_plain_engines_to_the_bit(folder: Path, name: str) -> None:
    config = config_of(folder, name)
    plain = native_engine(config)
    engine, gpu, _, phases, _ = on_twin(config, plain)
    add_all(plain)
    add_all(engine)
    expected, found = run_to_end(plain), run_to_end(engine)
    assert {k: tokens_of(v) for k, v in found.items()} == {k: tokens_of(v) for k, v in expected.items()}
    for outputs, others in ((found["scored"], expected["scored"]),):
        assert [o.logprobs for o in outputs if o.token_ids] == [o.logprobs for o in others if o.token_ids]
        assert [s for o in outputs for s in o.prompt_logprobs or []] == [
            s for o in others for s in o.prompt_logprobs or []
        ]
    assert engine.scheduler.pool.num_used == 0
    assert (engine.scheduler.num_preemptions > 0) == (name == "preempted")
    assert ("capture" in phases.seconds) == (gpu.twins[-1].num_replayed > 0) == config.cuda_graphs


def test_start_up_measures_then_captures_and_reports_each_phase(tmp_path: Path) -> None:
    config = config_of(tiny_nvfp4_llama(tmp_path / "m"), "one batch")
    _, gpu, kernels, phases, progress = on_twin(config, native_engine(config))
    assert list(phases.seconds) == ["warm_up", "kv_cache", "capture"]
    assert [twin.num_captured for twin in gpu.twins] == [2, 4]  # measured with the two largest of 1, 2, 4, 6
    captured = [fraction for name, fraction in progress if name == "capture"]
    assert captured == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])
    report = {choice.group: choice for choice in kernels.choices}
    assert (report["decode step"].backend, report["decode step"].reason) == ("cuda graph", "4 batch sizes up to 6")
    assert report["sampling"].reason.endswith("on the host")


def test_a_row_that_is_not_finite_ends_its_own_request_only(tmp_path: Path) -> None:
    config = config_of(tiny_nvfp4_llama(tmp_path / "m"), "without prefix caching")
    plain = native_engine(config)
    plain.add(submit("good", [1, 2, 3], 8, ignore_eos=True))
    expected = tokens_of(run_to_end(plain)["good"])
    engine, *_ = on_twin(config, plain)
    runner: Any = engine.executor
    engine.add(submit("bad", [9, 8, 7], 8, ignore_eos=True))
    engine.add(submit("good", [1, 2, 3], 8, ignore_eos=True))
    forward, steps = runner._model.forward, []

    def poisoned(batch: ForwardBatch) -> torch.Tensor:
        logits: torch.Tensor = forward(batch)
        steps.append(1)
        if len(steps) == 3:  # a decode step of both; "bad" came first
            logits[0, 5] = torch.nan
        return logits

    runner._model.forward = poisoned
    outputs = run_to_end(engine)
    assert outputs["bad"][-1].finish_reason == "error"
    assert "not finite" in (outputs["bad"][-1].error or "")
    assert len(tokens_of(outputs["bad"])) == 2
    assert tokens_of(outputs["good"]) == expected
    assert engine.scheduler.pool.num_used == 0


def test_a_gpu_that_is_asked_for_and_absent_ends_start_up(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(ConfigError, match="needs a GPU") as caught:
        build_engine(EngineConfig(model=str(tiny_nvfp4_llama(tmp_path / "m")), device="cuda"))
    assert caught.value.flag == "--device"
