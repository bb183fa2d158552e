"""SupervisedEngine: another engine takes a dead one's place, until it is enough; totals go on over restarts."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from nvfp4_runtime.config import EngineConfig, SimulatedConfig, SimulatedFault
from nvfp4_runtime.engine.messages import StepStats
from nvfp4_runtime.engine.pace import Pace
from nvfp4_runtime.engine.supervisor import SupervisedEngine, Supervision
from nvfp4_runtime.engine.token_stream import TokenStream
from nvfp4_runtime.errors import CheckpointError, EngineDeadError
from nvfp4_runtime.sampling.params import SamplingParams
from tests.engine.helpers import ENDS_UNREAD, StartedBy, make_config

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
QUICK = Supervision(stall_seconds=1.0, max_restarts=2, backoff_seconds=0.05)


def config(*faults: SimulatedFault, step_seconds: float = 0.01) -> EngineConfig:
    return make_config(simulated=SimulatedConfig(vocab_size=97, step_seconds=step_seconds, faults=faults))


async def collect(stream: TokenStream) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


async def until_alive(engine: SupervisedEngine) -> None:
    async with asyncio.timeout(10):
        while not engine.alive:
            await asyncio.sleep(0.01)


async def test_a_restart_brings_the_same_answers_and_totals_that_never_fall() -> None:
    engine = await SupervisedEngine.launch(config(), QUICK)
    seen: list[StepStats] = []
    finished: list[str] = []
    engine.on_step(seen.append)
    engine.on_finish(lambda output: finished.append(output.request_id))
    try:
        before = await collect(engine.submit([1, 2, 3], GREEDY, request_id="a"))
        first = engine.info.pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="ended"):
            async with asyncio.timeout(1.0):
                await collect(engine.submit([1, 2, 3], GREEDY, request_id="lost"))
        with pytest.raises(EngineDeadError) as refused:
            engine.submit([1], GREEDY, request_id="early")
        assert refused.value.retry_after_seconds is not None
        await until_alive(engine)
        assert engine.info.pid != first
        assert not Path(f"/proc/{first}").exists(), "it was waited for"
        assert await collect(engine.submit([1, 2, 3], GREEDY, request_id="b")) == before
        total = engine.stats.num_steps
        engine._step(StepStats(0, 0, 9, 0, 9))  # an abort between steps, which comes without totals
        assert engine.stats.num_steps == total
        assert seen.pop().num_steps == 0, "and is no step"
    finally:
        await engine.close()
    assert engine.num_restarts == 1
    assert finished == ["a", "b"]
    steps = [stats.num_steps for stats in seen]
    assert steps == sorted(steps)
    assert steps[-1] >= 24
    assert (engine.stats.num_running, engine.stats.num_used_blocks) == (0, 0)


async def test_it_gives_up_after_the_last_restart_and_says_so() -> None:
    engine = await SupervisedEngine.launch(config(SimulatedFault("death", prompt=(7,))), QUICK)
    try:
        for i in range(3):
            await until_alive(engine)
            with pytest.raises(EngineDeadError):
                await collect(engine.submit([7], GREEDY, request_id=f"r{i}"))
        assert "ended" in await asyncio.wait_for(engine.given_up, 5)
        assert not engine.alive
        with pytest.raises(EngineDeadError) as refused:
            engine.submit([1], GREEDY, request_id="late")
        assert refused.value.retry_after_seconds is None
    finally:
        await engine.close()


async def test_an_engine_that_ends_while_it_is_started_again_counts_as_a_restart_and_the_next_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = await SupervisedEngine.launch(config(), QUICK)
    try:
        ended: list[int] = []

        def only_once(pid: int) -> None:
            ended.append(pid)
            monkeypatch.undo()

        monkeypatch.setattr(subprocess, "Popen", StartedBy(only_once, ENDS_UNREAD))
        os.kill(engine.info.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            while not ended:
                await asyncio.sleep(0.01)
        await until_alive(engine)
        assert engine.num_restarts == 1
        assert len(await collect(engine.submit([1], GREEDY, request_id="r"))) == 12
    finally:
        await engine.close()


async def test_a_stopped_engine_is_killed_after_the_stall_time_and_replaced() -> None:
    engine = await SupervisedEngine.launch(config(), QUICK)
    try:
        stream = engine.submit([1], SamplingParams(max_tokens=240), request_id="r")
        await anext(stream)
        os.kill(engine.info.pid, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match="hangs"):
            async with asyncio.timeout(2.0):
                await collect(stream)
        await until_alive(engine)
        assert engine.num_stalls == 1
        assert engine.stalled_seconds == 0
    finally:
        await engine.close()


async def test_a_step_that_takes_as_long_as_such_steps_take_is_no_hang() -> None:
    """Each step takes longer than the stall time; single tokens taught the engine what to announce."""
    slow = Supervision(stall_seconds=0.6, max_restarts=0)
    engine = await SupervisedEngine.launch(config(step_seconds=1.3), slow)
    try:
        engine._policy = Supervision(stall_seconds=30.0)  # nothing is known before the first step
        await collect(engine.submit([1], SamplingParams(max_tokens=1), request_id="teaches"))
        engine._policy = slow
        assert len(await collect(engine.submit([1], SamplingParams(max_tokens=2), request_id="r"))) == 2
        assert engine.num_stalls == 0
    finally:
        await engine.close()


async def test_a_start_that_takes_too_long_has_failed_and_leaves_nothing() -> None:
    with pytest.raises(EngineDeadError, match="not ready after"):
        await SupervisedEngine.launch(config(), Supervision(load_seconds=0.01))


async def test_the_first_start_raises_what_the_engine_raised_and_is_not_repeated() -> None:
    with pytest.raises(CheckpointError):
        await SupervisedEngine.launch(EngineConfig(model="/does/not/exist"), QUICK)


def test_restarts_back_off_and_stay_bounded() -> None:
    policy = Supervision()
    assert [policy.backoff(i) for i in range(8)] == [0, 1, 2, 4, 8, 16, 30, 30]


def test_pace_expects_what_was_seen_and_forgets_slowly() -> None:
    pace = Pace()
    assert pace.expected_seconds(1000) == 0
    pace.observe(1, 0.5)
    assert pace.expected_seconds(64) == 32, "as if each token cost what a single one does"
    pace.observe(64, 3.2)
    assert pace.expected_seconds(1000) == pytest.approx(50)
    pace.observe(64, 0.64)
    assert 10 < pace.expected_seconds(1000) < 50
    pace.observe(0, 9.0)
    assert pace.expected_seconds(1) == 0.5
