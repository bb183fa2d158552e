"""The engine in its own process: the same tokens, aborts, refusals and a clean end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from nvfp4_runtime.config import EngineConfig, SimulatedConfig
from nvfp4_runtime.engine.client import EngineClient
from nvfp4_runtime.engine.messages import Shutdown, StepStats, Submit
from nvfp4_runtime.engine.token_stream import TokenStream
from nvfp4_runtime.engine.wire import FrameBuffer, decode_to_engine, frame
from nvfp4_runtime.errors import CheckpointError, EngineDeadError, NVFP4Error, PromptTooLongError, QueueFullError
from nvfp4_runtime.sampling.params import SamplingParams
from tests.engine.helpers import ENDS_UNREAD, StartedBy, make_config, make_engine, run_to_end, submit, tokens_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


async def collect(stream: TokenStream) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


async def test_tokens_over_the_wire_equal_the_in_process_engine() -> None:
    client = await EngineClient.launch(make_config())
    try:
        prompts = [[i, i + 1, i + 2] for i in range(20)]
        streams = [client.submit(p, GREEDY, request_id=f"r{i}") for i, p in enumerate(prompts)]
        got = await asyncio.gather(*(collect(s) for s in streams))
    finally:
        await client.close()
    engine = make_engine()
    for i, prompt in enumerate(prompts):
        engine.add(submit(f"r{i}", prompt, 12))
    outputs = run_to_end(engine)
    assert got == [tokens_of(outputs[f"r{i}"]) for i in range(20)]


async def test_the_engine_process_imports_no_torch_when_simulated_and_ends_with_the_client() -> None:
    client = await EngineClient.launch(make_config())
    pid = client.info.pid
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    await client.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_abort_ends_the_stream_and_frees_every_block() -> None:
    client = await EngineClient.launch(make_config(simulated=SimulatedConfig(vocab_size=97, step_seconds=0.05)))
    try:
        stats: list[StepStats] = []
        client.on_step(stats.append)
        stream = client.submit([1, 2, 3], SamplingParams(max_tokens=200), request_id="r")
        first = await anext(stream)
        assert first.token_ids
        before = stats[-1].num_steps
        client.abort("r")
        reasons = [output.finish_reason async for output in stream]
        assert reasons[-1] == "abort"
        assert max(s.num_steps for s in stats) - before <= 2, "an abort takes effect within two steps"
        assert (stats[-1].num_running, stats[-1].num_waiting, stats[-1].num_used_blocks) == (0, 0, 0)
        client.abort("r")  # again: ignored
    finally:
        await client.close()


async def test_refusals_come_at_once_without_a_round_trip() -> None:
    config = make_config(max_num_seqs=1, queue=1, simulated=SimulatedConfig(vocab_size=97, step_seconds=0.02))
    client = await EngineClient.launch(config)
    try:
        with pytest.raises(PromptTooLongError):
            client.submit([1] * 1000, GREEDY, request_id="long")
        client.submit([1], GREEDY, request_id="a")
        client.submit([1], GREEDY, request_id="b")
        with pytest.raises(QueueFullError):
            client.submit([1], GREEDY, request_id="c")
    finally:
        await client.close()


async def test_killing_the_engine_ends_every_stream_with_an_error() -> None:
    client = await EngineClient.launch(make_config(simulated=SimulatedConfig(vocab_size=97, step_seconds=0.01)))
    streams = [client.submit([i], SamplingParams(max_tokens=200), request_id=f"r{i}") for i in range(5)]
    await anext(streams[0])
    os.kill(client.info.pid, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(EngineDeadError):
            async with asyncio.timeout(1.0):
                await collect(stream)
    assert not client.alive
    with pytest.raises(EngineDeadError):
        client.submit([1], GREEDY, request_id="late")
    await client.close()


async def test_signals_for_the_whole_process_group_leave_the_engine_to_its_server() -> None:
    client = await EngineClient.launch(make_config())
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(client.info.pid, number)
    assert len(await collect(client.submit([1], GREEDY, request_id="r"))) == 12
    await client.close()


async def test_a_failing_callback_ends_streams_instead_of_leaving_them_waiting() -> None:
    client = await EngineClient.launch(make_config())

    def fail(_: StepStats) -> None:
        raise ZeroDivisionError

    client.on_step(fail)
    with pytest.raises(EngineDeadError, match="could not be handled"):
        async with asyncio.timeout(5.0):
            await collect(client.submit([1], GREEDY, request_id="r"))
    await client.close()


async def test_a_checkpoint_that_does_not_load_raises_its_own_error() -> None:
    with pytest.raises(NVFP4Error) as caught:
        await EngineClient.launch(EngineConfig(model="/does/not/exist"))
    assert isinstance(caught.value, CheckpointError)
    assert "/does/not/exist" in str(caught.value)


def test_frames_survive_any_split() -> None:
    messages = [Submit("a", [1, 2, 3], GREEDY, 1.5), Shutdown()]
    data = b"".join(frame(message) for message in messages)
    buffer = FrameBuffer()
    payloads = [payload for i in range(len(data)) for payload in buffer.feed(data[i : i + 1])]
    assert [decode_to_engine(payload) for payload in payloads] == messages


def test_an_absurd_frame_length_is_refused() -> None:
    with pytest.raises(ValueError, match="was announced"):
        FrameBuffer().feed(b"\xff\xff\xff\xff")


async def test_a_signal_before_the_engine_ignores_it_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(pid: int) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)

    monkeypatch.setattr(subprocess, "Popen", StartedBy(send))
    client = await EngineClient.launch(make_config())
    assert len(await collect(client.submit([1], GREEDY, request_id="r"))) == 12
    await client.close()


async def test_an_engine_that_ends_with_its_first_message_unread_ended_while_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", StartedBy(command=ENDS_UNREAD))
    with pytest.raises(EngineDeadError, match="ended while loading"):
        await EngineClient.launch(make_config())


async def test_an_engine_starts_while_more_files_are_open_than_select_takes(many_open_files: None) -> None:
    client = await EngineClient.launch(make_config())
    assert len(await collect(client.submit([1], GREEDY, request_id="r"))) == 12
    await client.close()
