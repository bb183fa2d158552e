"""A whole model on Triton's kernels, through the GPU's engine: under the interpreter, the CPU in the GPU's place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from nvfp4_runtime.engine.build import build_engine
from nvfp4_runtime.engine.device_runner import DeviceRunner
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.phases import Phases
from nvfp4_runtime.engine.scheduler import Scheduler
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.models import load_model
from tests import tiny, tiny_families
from tests.engine.helpers import run_to_end, submit, tokens_of
from tests.engine.test_device_runner import TwinGpu
from tests.tiny import tiny_nvfp4_llama


def answers(engine: Engine) -> dict[str, list[int]]:
    engine.add(submit("greedy", [5, 6, 7, 8], 4, ignore_eos=True))
    engine.add(submit("drawn", [9, 10], 4, temperature=1.0, seed=3, top_p=0.9, ignore_eos=True))
    return {name: tokens_of(outputs) for name, outputs in run_to_end(engine).items()}


def hybrid_of(config: tiny.Config) -> Callable[[Path], Path]:
    """A folder of it, in plain float32."""
    return lambda folder: tiny.write_plain(folder, config, tiny.random_tensors(config, seed=4))


MODELS = {
    "nvfp4 llama": tiny_nvfp4_llama,
    "nemotron_h": hybrid_of(tiny.nemotron_h_config()),
    "qwen3_5": hybrid_of(tiny_families.qwen3_5_config()),
}


@pytest.mark.parametrize("name", MODELS)
def test_staged_fed_and_captured_steps_give_the_cpus_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = EngineConfig(
        model=str(MODELS[name](tmp_path / "m")),
        dtype="float32",  # in bfloat16 the two round at different places, and random weights have many near ties
        device="cpu",
        cache=CacheConfig(num_blocks=17),
        scheduler=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=48),
    )
    try:
        kernels = Kernels(available_backends("triton"), "float32")
    except ConfigError as error:
        pytest.skip(str(error))
    if not kernels.backends[0].describe().get("device", "").startswith("none"):
        pytest.skip("a GPU is here: test_on_a_gpu.py runs these kernels on it")
    # steps of every size take the interpreter minutes, and compile nothing
    monkeypatch.setattr(DeviceRunner, "warm_up", lambda self: None)
    monkeypatch.setattr(DeviceRunner, "run_largest", lambda self: None)
    plain, gpu = build_engine(config), TwinGpu("most")
    model = load_model(Checkpoint.open(config.model), kernels, "auto", 48)
    placed = gpu.place(config, model, 48, Phases(None), kernels)
    old = plain.scheduler
    pool = type(old.pool)(placed.num_blocks)
    scheduler = Scheduler(old.config, pool, 16, old.enable_prefix_caching, old.num_state_slots)
    engine = placed.make(scheduler=scheduler, info=plain.info)
    assert {choice.backend for choice in kernels.choices} == {"triton", "cuda graph"}
    assert answers(engine) == answers(plain)
    assert gpu.twins[-1].num_replayed >= 3
