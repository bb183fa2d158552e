"""Several engine processes behind one interface: routed, counted together, replaced one by one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from nvfp4_runtime.config import EngineConfig, ParallelConfig, SimulatedConfig, SimulatedFault
from nvfp4_runtime.engine.messages import StepStats
from nvfp4_runtime.engine.replicas import Replicas
from nvfp4_runtime.engine.supervisor import Supervision
from nvfp4_runtime.engine.token_stream import TokenStream
from nvfp4_runtime.errors import CheckpointError, EngineDeadError, PromptTooLongError, QueueFullError
from nvfp4_runtime.sampling.params import SamplingParams
from tests.engine.helpers import make_config, make_engine, run_to_end, submit, tokens_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
QUICK = Supervision(stall_seconds=5.0, max_restarts=1, backoff_seconds=0.05)


def config(*faults: SimulatedFault, queue: int = 1000, seqs: int = 8, step_seconds: float = 0.005) -> EngineConfig:
    simulated = SimulatedConfig(vocab_size=97, step_seconds=step_seconds, faults=faults)
    made = make_config(simulated=simulated, queue=queue, max_num_seqs=seqs)
    return replace(made, parallel=ParallelConfig(replicas=2))


@pytest.fixture
async def replicas() -> AsyncIterator[Replicas]:
    made = await Replicas.launch(config(), QUICK)
    yield made
    await made.close()


async def collect(stream: TokenStream) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


async def test_tokens_are_those_of_one_engine_and_figures_those_of_all(replicas: Replicas) -> None:
    seen: list[StepStats] = []
    finished: list[str] = []
    replicas.on_step(seen.append)
    replicas.on_finish(lambda output: finished.append(output.request_id))
    prompts = [[i, i + 1, i + 2] for i in range(20)]
    streams = [replicas.submit(p, GREEDY, request_id=f"r{i}") for i, p in enumerate(prompts)]
    assert [engine.admission.num_requests for engine in replicas.engines] == [10, 10]
    assert replicas.admission.num_requests == 20
    got = await asyncio.gather(*map(collect, streams))
    engine = make_engine()
    for i, prompt in enumerate(prompts):
        engine.add(submit(f"r{i}", prompt, 12))
    outputs = run_to_end(engine)
    assert got == [tokens_of(outputs[f"r{i}"]) for i in range(20)]
    assert sorted(finished) == sorted(f"r{i}" for i in range(20))
    assert (replicas.stats.num_running, replicas.stats.num_used_blocks) == (0, 0)
    assert replicas.stats.num_total_blocks == 2 * 64 == replicas.info.num_blocks - 1
    assert len({*replicas.info.replica_pids}) == 2
    assert sum(stats.step_generation_tokens for stats in seen) == 20 * 12
    steps = [stats.num_steps for stats in seen if stats.num_steps]
    assert steps == sorted(steps)
    assert steps[-1] == sum(engine.stats.num_steps for engine in replicas.engines)


async def test_a_prompt_returns_to_the_engine_that_has_its_prefix(replicas: Replicas) -> None:
    documents = [[d] * 40 for d in range(6)]  # a cache holds all of them, and their answers
    for turn in range(3):
        for d, document in enumerate(documents):
            prompt = [*document, *range(turn + 1)]
            await collect(replicas.submit(prompt, GREEDY, request_id=f"{d}-{turn}"))
    hits, queries = replicas.stats.prefix_cache_hits, replicas.stats.prefix_cache_queries
    assert hits == 6 * 2 * 40, "every later turn found its document whole"
    assert hits == replicas.router.num_matched
    assert queries == replicas.router.num_tokens
    assert all(engine.stats.prefix_cache_hits > 0 for engine in replicas.engines), "and both did some of it"


async def test_one_dies_and_the_other_goes_on_until_it_is_replaced(replicas: Replicas) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=200)
    streams = [replicas.submit([i], long, request_id=f"r{i}") for i in range(2)]
    victim = next(i for i, engine in enumerate(replicas.engines) if engine.admission.num_requests)
    for stream in streams:
        await anext(stream)
    os.kill(replicas.engines[0].info.pid, signal.SIGKILL)
    results = await asyncio.gather(*map(collect, streams), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["EngineDeadError", "list"], victim
    assert replicas.alive
    assert len(await collect(replicas.submit([5], GREEDY, request_id="meanwhile"))) == 12
    async with asyncio.timeout(10):
        while not all(engine.alive for engine in replicas.engines):
            await asyncio.sleep(0.01)
    assert replicas.num_restarts == 1
    pair = [replicas.submit([i], GREEDY, request_id=f"after{i}") for i in range(2)]
    assert all(engine.admission.num_requests == 1 for engine in replicas.engines)
    await asyncio.gather(*map(collect, pair))


async def test_it_is_over_when_the_last_one_is_given_up() -> None:
    made = await Replicas.launch(config(SimulatedFault("death", prompt=(7,))), Supervision(max_restarts=0))
    try:
        for i in range(2):
            assert made.alive
            with pytest.raises(EngineDeadError):
                await collect(made.submit([7], GREEDY, request_id=f"r{i}"))
            async with asyncio.timeout(5):
                while not made.engines[0].given_up.done() and not made.engines[1].given_up.done():
                    await asyncio.sleep(0.01)
        assert "ended" in await asyncio.wait_for(made.given_up, 5)
        with pytest.raises(EngineDeadError) as refused:
            made.submit([1], GREEDY, request_id="late")
        assert refused.value.retry_after_seconds is None
    finally:
        await made.close()


async def test_refusals_come_only_when_nobody_has_room_and_bad_requests_at_once() -> None:
    made = await Replicas.launch(config(queue=1, seqs=1, step_seconds=0.05), QUICK)
    try:
        with pytest.raises(PromptTooLongError):
            made.submit([1] * 1000, GREEDY, request_id="long")
        for i in range(4):
            made.admission.check_room()
            made.submit([i], GREEDY, request_id=f"r{i}")
        with pytest.raises(QueueFullError):
            made.admission.check_room()
        with pytest.raises(QueueFullError) as full:
            made.submit([9], GREEDY, request_id="more")
        assert full.value.retry_after_seconds > 0
        made.abort("r0")
        made.abort("unknown")
        async with asyncio.timeout(5):
            while made.admission.num_requests == 4:
                await asyncio.sleep(0.01)
        await collect(made.submit([9], GREEDY, request_id="more"))
    finally:
        await made.close()


async def test_what_one_raises_while_loading_ends_the_others() -> None:
    with pytest.raises(CheckpointError):
        await Replicas.launch(EngineConfig(model="/does/not/exist", parallel=ParallelConfig(replicas=2)), QUICK)


async def test_engines_draw_different_seeds_and_know_who_they_are(replicas: Replicas) -> None:
    drawn = SamplingParams(temperature=1.0, max_tokens=12)
    streams = [replicas.submit([3, 1, 4], drawn, request_id=f"r{i}") for i in range(2)]
    assert all(engine.admission.num_requests == 1 for engine in replicas.engines)
    await asyncio.gather(*map(collect, streams))
    assert [engine._config.seed for engine in replicas.engines] == [0, 1]
