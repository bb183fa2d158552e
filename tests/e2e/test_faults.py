"""What clients and probes see of faults, deaths, hangs and shutdowns: real processes, over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Launch, LiveServer
from tests.e2e.test_server_process import run

SIMULATED = ("--simulate", "--simulate-step-seconds", "0.01", "--max-num-seqs", "8", "--num-kv-blocks", "400")


class Streams:
    """Completions that stream in threads; what each said last, and when."""

    def __init__(self, server: LiveServer, prompts: list[str], max_tokens: int = 3000) -> None:
        self._server, self._max_tokens = server, max_tokens
        self.events: dict[str, list[str]] = {prompt: [] for prompt in prompts}
        self.ended: dict[str, float] = {}
        self._threads = [threading.Thread(target=self._read, args=[prompt], daemon=True) for prompt in prompts]
        for thread in self._threads:
            thread.start()

    def _read(self, prompt: str) -> None:
        body = {"prompt": prompt, "max_tokens": self._max_tokens, "stream": True}
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", f"{self._server.url}/v1/completions", json=body, timeout=60) as response,
        ):
            self.events[prompt] += [line for line in response.iter_lines() if line]
        self.ended[prompt] = time.monotonic()

    def all_running(self) -> None:
        until(lambda: self._server.metric("vllm:num_requests_running") == len(self._threads))

    def join(self, seconds: float = 20) -> None:
        for thread in self._threads:
            thread.join(seconds)
            assert not thread.is_alive()

    def error(self, prompt: str) -> dict[str, object]:
        """The error event, behind which [DONE] comes."""
        assert self.events[prompt][-1] == "data: [DONE]", self.events[prompt][-3:]
        error: dict[str, object] = json.loads(self.events[prompt][-2].removeprefix("data: "))["error"]
        return error


def until(condition: Callable[[], bool], seconds: float = 10) -> float:
    """Wait for it; returns the seconds that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not happen in time"
        time.sleep(0.01)
    return time.monotonic() - started


def status(server: LiveServer, path: str) -> int:
    return httpx.get(f"{server.url}{path}", timeout=5).status_code


def complete(server: LiveServer, prompt: str, max_tokens: int = 4) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)


def is_gone(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].startswith("Z")
    return True


@pytest.fixture(scope="module")
def guilty(launch: Launch) -> Iterator[LiveServer]:
    flags = ("--simulate-fault", "exception@prompt=RAISE", "--simulate-fault", "nan@prompt=NANNY")
    server = launch(*SIMULATED, *flags, "--simulate-fault", "memory@prompt=GREEDY")
    yield server
    server.assert_idle()
    assert server.terminate() == 0


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [("a NANNY", "model_output_invalid"), ("a RAISE", "engine_fault"), ("a GREEDY one", "out_of_memory")],
)
def test_a_fault_of_one_request_is_its_500_and_nobody_else_notices(guilty: LiveServer, prompt: str, kind: str) -> None:
    alone = complete(guilty, "an innocent", 100).json()["choices"][0]["text"]
    mates = Streams(guilty, [f"mate {i}" for i in range(4)], max_tokens=100)
    mates.all_running()
    innocent: list[str] = []
    thread = threading.Thread(
        target=lambda: innocent.append(complete(guilty, "an innocent", 100).json()["choices"][0]["text"])
    )
    thread.start()
    response = complete(guilty, prompt)
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["code"]) == (kind, 500)
    assert "Traceback" not in error["message"]
    assert "/" not in error["message"]
    mates.join()
    thread.join(20)
    assert innocent == [alone]
    assert all("length" in events[-2] for events in mates.events.values())


def test_faults_are_counted(guilty: LiveServer) -> None:
    before = {n: guilty.metric(f"nvfp4_{n}_total") for n in ("invalid_outputs", "step_faults", "step_memory_faults")}
    for prompt in ("NANNY", "RAISE", "GREEDY"):
        assert complete(guilty, prompt).status_code == 500
    after = {name: guilty.metric(f"nvfp4_{name}_total") for name in before}
    assert after["invalid_outputs"] - before["invalid_outputs"] == 1
    assert after["step_faults"] - before["step_faults"] == 2
    assert after["step_memory_faults"] - before["step_memory_faults"] >= 1


def test_killed_engine_errors_streams_and_probes_within_a_second_and_is_replaced(launch: Launch) -> None:
    server = launch(*SIMULATED)
    assert status(server, "/health/ready") == status(server, "/health/live") == status(server, "/health") == 200
    streams = Streams(server, [f"stream {i}" for i in range(8)])
    streams.all_running()
    engine = server.engine_pid()
    killed = time.monotonic()
    os.kill(engine, signal.SIGKILL)
    until(lambda: status(server, "/health/ready") == 503, 1.0)
    assert status(server, "/health/live") == 200
    refused = complete(server, "too early")
    streams.join()
    for prompt in streams.events:
        assert streams.ended[prompt] - killed < 1.0
        assert streams.error(prompt)["code"] == 503
    if refused.status_code != 200:  # the new engine may be there already
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
    until(lambda: status(server, "/health/ready") == 200)
    assert complete(server, "again").status_code == 200
    assert server.metric("nvfp4_engine_restarts_total") == 1
    assert is_gone(engine)
    assert server.engine_pid() != engine
    server.assert_idle()
    assert server.terminate() == 0


def test_an_engine_that_keeps_dying_ends_the_server_with_3(launch: Launch) -> None:
    server = launch(*SIMULATED, "--max-engine-restarts", "1", "--simulate-fault", "death@prompt=DIE")
    assert complete(server, "DIE").status_code == 503
    until(lambda: status(server, "/health/ready") == 200)
    assert complete(server, "fine").status_code == 200
    assert complete(server, "DIE").status_code == 503
    assert server.process.wait(10) == 3


@pytest.mark.parametrize("stopped", [True, False], ids=["SIGSTOP", "a step that never returns"])
def test_a_hang_is_seen_after_the_stall_timeout_and_the_engine_replaced(launch: Launch, stopped: bool) -> None:
    server = launch(*SIMULATED, "--stall-timeout", "1", "--simulate-fault", "hang@prompt=HANG")
    streams = Streams(server, [f"stream {i}" for i in range(3)])
    streams.all_running()
    engine = server.engine_pid()
    hung = time.monotonic()
    if stopped:
        os.kill(engine, signal.SIGSTOP)
    else:
        threading.Thread(target=complete, args=[server, "HANG"], daemon=True).start()
    until(lambda: status(server, "/health/ready") == 503, 2.0)
    streams.join()
    for prompt in streams.events:
        assert 0.9 < streams.ended[prompt] - hung < 2.5
        assert "hangs" in str(streams.error(prompt)["message"])
    until(lambda: status(server, "/health/ready") == 200)
    assert complete(server, "again").status_code == 200
    assert server.metric("nvfp4_engine_stalls_total") == 1
    assert is_gone(engine)
    assert server.terminate() == 0


def test_a_hang_ends_the_server_with_3_where_the_flag_says_so(launch: Launch) -> None:
    server = launch(*SIMULATED, "--stall-timeout", "0.5", "--exit-on-engine-death", "--simulate-fault", "hang@step=3")
    assert complete(server, "any").status_code == 503
    assert server.process.wait(10) == 3
    assert "hangs" in server.log()


def test_an_idle_engine_is_not_thought_to_hang(launch: Launch) -> None:
    server = launch(*SIMULATED, "--stall-timeout", "0.3")
    time.sleep(1.0)
    assert complete(server, "after a rest").status_code == 200
    assert server.metric("nvfp4_engine_stalls_total") == 0
    assert server.terminate() == 0


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_no_engine_outlives_a_server_that_is_killed(launch: Launch, state: str) -> None:
    server = launch(*SIMULATED)
    engine = server.engine_pid()
    if state == "stopped":
        os.kill(engine, signal.SIGSTOP)
    before = set(os.listdir("/dev/shm"))
    server.kill()
    until(lambda: is_gone(engine), 2.0)
    assert set(os.listdir("/dev/shm")) <= before


def test_sigterm_is_told_to_probes_at_once_accepts_for_the_delay_then_refuses_and_drains(launch: Launch) -> None:
    server = launch(*SIMULATED, env={"NVFP4_DRAIN_DELAY": "1"})
    streams = Streams(server, ["a stream"], max_tokens=250)
    streams.all_running()
    server.process.send_signal(signal.SIGTERM)
    # 0.02 s by `python -m loadtest.faults`; within the delay is what matters here, beside other tests
    assert until(lambda: status(server, "/health/ready") == 503, 0.5) < 0.5
    assert status(server, "/health/live") == 200
    assert complete(server, "while accepting").status_code == 200
    time.sleep(1.1)
    refused = complete(server, "too late")
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "5"
    assert refused.headers["connection"] == "close"
    assert server.process.wait(10) == 0
    streams.join()
    assert "length" in streams.events["a stream"][-2]


def test_what_still_runs_after_the_shutdown_timeout_ends_with_an_error_event(launch: Launch) -> None:
    server = launch(*SIMULATED, "--shutdown-timeout", "0.5")
    streams = Streams(server, ["a", "b"])
    streams.all_running()
    assert server.terminate() == 0
    streams.join()
    for prompt in streams.events:
        assert "shutting down" in str(streams.error(prompt)["message"])


def test_ctrl_c_with_nothing_running_is_quick_whatever_the_drain_delay(launch: Launch) -> None:
    server = launch(*SIMULATED, env={"NVFP4_DRAIN_DELAY": "20"})
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(5) == 0


def test_second_sigterm_during_the_drain_delay_ends_at_once(launch: Launch) -> None:
    server = launch(*SIMULATED, env={"NVFP4_DRAIN_DELAY": "20"})
    server.process.send_signal(signal.SIGTERM)
    until(lambda: status(server, "/health/ready") == 503)
    assert server.terminate(5) == 0


def test_a_second_signal_does_not_wait_for_an_engine_that_hangs_and_says_nothing_untoward(launch: Launch) -> None:
    server = launch(*SIMULATED)
    streams = Streams(server, ["stream"])
    streams.all_running()
    os.kill(server.engine_pid(), signal.SIGSTOP)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: status(server, "/health/ready") == 503)
    assert server.terminate(4) == 0, "it gave the engine its 5 s"
    streams.join()
    assert streams.error("stream")["code"] == 503
    assert "Traceback" not in server.log()


def test_a_full_queue_is_not_ready_and_still_healthy(launch: Launch) -> None:
    server = launch(
        "--simulate", "--simulate-step-seconds", "0.01", "--max-num-seqs", "1", "--max-queued-requests", "2"
    )
    streams = Streams(server, ["a", "b", "c"], max_tokens=80)
    until(lambda: server.metric("vllm:num_requests_waiting") == 2)
    response = httpx.get(f"{server.url}/health/ready")
    assert response.status_code == 503
    assert "queue is full" in response.json()["error"]["message"]
    assert status(server, "/health") == 200
    streams.join()
    assert status(server, "/health/ready") == 200
    assert server.terminate() == 0


def test_degenerate_answers_are_counted(launch: Launch) -> None:
    server = launch("--simulate", "--simulate-script", "ha")
    complete(server, "laugh", 200)
    assert server.metric("nvfp4_degenerate_outputs_total") == 1
    assert server.terminate() == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--simulate-fault", "death@step=1"), "needs --simulate"),
        (("--simulate", "--simulate-fault", "flood@step=1"), "KIND@step=N"),
        (("--simulate", "--simulate-fault", "nan@step=0"), "KIND@step=N"),
        (("--simulate", "--stall-timeout", "0"), "--stall-timeout"),
        (("--simulate", "--drain-delay", "-1"), "--drain-delay"),
        (("--simulate", "--max-engine-restarts", "-1"), "--max-engine-restarts"),
    ],
)
def test_flags_that_make_no_sense_are_one_line_and_exit_code_1(flags: tuple[str, ...], said: str) -> None:
    done = run("serve", "--port", "0", *flags)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
