"""Small engines over the simulated executor, for tests of everything around the model."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from nvfp4_runtime.config import CacheConfig, EngineConfig, SchedulerConfig, SimulatedConfig
from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.messages import Submit, TokenOutput
from nvfp4_runtime.engine.simulated import simulated_engine
from nvfp4_runtime.sampling.params import SamplingParams


def make_config(
    num_blocks: int = 65,
    max_num_seqs: int = 8,
    budget: int = 64,
    max_model_len: int = 512,
    block_size: int = 4,
    prefix: bool = True,
    queue: int = 1000,
    simulated: SimulatedConfig | None = None,
) -> EngineConfig:
    return EngineConfig(
        cache=CacheConfig(block_size=block_size, num_blocks=num_blocks, enable_prefix_caching=prefix),
        scheduler=SchedulerConfig(max_num_seqs, budget, max_model_len, queue),
        simulated=simulated or SimulatedConfig(vocab_size=97),
    )


def make_engine(**options: object) -> Engine:
    return simulated_engine(make_config(**options))  # type: ignore[arg-type]  # keyword arguments of make_config


def submit(request_id: str, prompt: list[int], max_tokens: int = 8, **params: object) -> Submit:
    options: dict[str, object] = {"temperature": 0.0, "max_tokens": max_tokens, **params}
    return Submit(request_id, prompt, SamplingParams(**options), time.monotonic())  # type: ignore[arg-type]


def run_to_end(engine: Engine, max_steps: int = 10_000) -> dict[str, list[TokenOutput]]:
    """Step until idle, checking every invariant after each step; outputs by request."""
    outputs: dict[str, list[TokenOutput]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return outputs
        for output in engine.step()[0]:
            outputs.setdefault(output.request_id, []).append(output)
        engine.scheduler.check()
    raise AssertionError(f"the engine still has work after {max_steps} steps")


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


POPEN = subprocess.Popen
# a program that ends once its file argument can be read, without reading it
ENDS_UNREAD = [sys.executable, "-c", "import select, sys; select.select([int(sys.argv[1])], [], [])"]


class StartedBy:
    """In place of subprocess.Popen: starts `command` with the engine's file, or the engine itself; then does `then`."""

    def __init__(self, then: Callable[[int], None] = lambda pid: None, command: list[str] | None = None) -> None:
        self._then, self._command = then, command

    def __call__(self, args: list[str], **options: Any) -> subprocess.Popen[bytes]:
        command = args if self._command is None else [*self._command, args[-1]]
        process = POPEN(command, **options)
        self._then(process.pid)
        return process
