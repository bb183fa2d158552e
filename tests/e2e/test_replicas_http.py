"""`nvfp4 serve --data-parallel-size 2`: one server, two engines; one dies and nobody but its own requests notices."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.e2e.conftest import Launch
from tests.e2e.test_faults import SIMULATED, complete, status, until


@pytest.fixture
def flags() -> tuple[str, ...]:
    return (*SIMULATED, "--data-parallel-size", "2")


def test_requests_spread_and_a_dead_engine_leaves_the_server_ready(launch: Launch, flags: tuple[str, ...]) -> None:
    server = launch(*flags)
    assert "engines   2 (processes" in server.output()
    pids = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    assert len(pids) == 2
    text = complete(server, "some prompt", 8).json()["choices"][0]["text"]
    assert server.metrics()['vllm:num_requests_running{engine="0",model_name="simulated"}'] == 0
    os.kill(int(pids[0]), signal.SIGKILL)
    until(lambda: server.metrics()['nvfp4_replica_up{model_name="simulated",replica="0"}'] == 0, 5)
    assert status(server, "/health/ready") == 200
    assert complete(server, "some prompt", 8).json()["choices"][0]["text"] == text
    until(lambda: server.metrics()['nvfp4_replica_up{model_name="simulated",replica="0"}'] == 1)
    metrics = server.metrics()
    assert metrics['nvfp4_engine_restarts_total{engine="0",model_name="simulated"}'] == 1
    assert metrics['nvfp4_routed_prompt_tokens_total{model_name="simulated"}'] == 2 * len("some prompt")
    assert server.terminate() == 0
