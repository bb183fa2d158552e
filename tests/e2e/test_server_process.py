"""`nvfp4 serve` as a process: start-up screen, signals, exit codes, the death of its engine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from nvfp4_runtime.text.simulated import byte_tokenizer
from tests.e2e.conftest import REPOSITORY, Launch, LiveServer

SLOW = ("--simulate", "--simulate-step-seconds", "0.02")


def stream(server: LiveServer, max_tokens: int, started: threading.Event) -> tuple[threading.Thread, list[str]]:
    """Stream a completion in a thread; the lines come into the list."""
    lines: list[str] = []

    def read() -> None:
        body = {"prompt": "Hi", "max_tokens": max_tokens, "stream": True}
        # A stream that is cut ends the list, which the tests look at.
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response,
        ):
            for line in response.iter_lines():
                lines.append(line)
                started.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert started.wait(10)
    return thread, lines


def test_start_up_screen_says_what_runs_where(simulated: LiveServer) -> None:
    screen = simulated.output()
    for label in (
        "model",
        "numerics",
        "device",
        "backends",
        "layers",
        "weights",
        "KV cache",
        "limits",
        "start-up",
        "address",
    ):
        assert f"\n  {label} " in screen, screen
    assert "399 blocks of 16, 6384 tokens fit" in screen
    command = next(line for line in screen.splitlines() if line.strip().startswith("curl "))
    assert f"{simulated.url}/v1/chat/completions" in command


def test_curl_line_of_the_screen_works_as_printed(launch: Launch) -> None:
    server = launch("--simulate", "--simulate-script", "Paris.", "--max-model-len", "128")
    command = next(line for line in server.output().splitlines() if line.strip().startswith("curl "))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert '"content":"Paris.Paris.' in done.stdout
    assert server.terminate() == 0


def test_sigterm_lets_running_streams_finish_and_exits_0(launch: Launch) -> None:
    server = launch(*SLOW)
    thread, lines = stream(server, 60, threading.Event())
    assert server.terminate() == 0
    thread.join(10)
    assert lines[-2] == "data: [DONE]"
    assert len([line for line in lines if line.startswith("data: {")]) > 10
    assert "length" in lines[-4]


def test_sigterm_ends_an_idle_server_at_once(launch: Launch) -> None:
    server = launch("--simulate", "--max-model-len", "128")
    with httpx.Client() as client:  # whose connection stays open
        assert client.get(f"{server.url}/health").status_code == 200
        started = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - started < 1


def test_sigterm_refuses_a_request_whose_body_never_came_whole(launch: Launch) -> None:
    server = launch("--simulate", "--max-model-len", "128", "--drain-delay", "0.3")
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=10) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        time.sleep(0.2)
        started = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - started < 5, "the shutdown timeout of 30 s is for requests that are at work"
        assert client.recv(100).startswith(b"HTTP/1.1 503 ")
    assert "Traceback" not in server.log()


def test_sigterm_ends_streams_that_take_longer_than_the_timeout(launch: Launch) -> None:
    server = launch(*SLOW, "--shutdown-timeout", "1")
    stream(server, 4000, threading.Event())[0]
    started = time.monotonic()
    assert server.terminate() == 0
    assert time.monotonic() - started < 15


def test_shutdown_timeout_of_0_ends_streams_at_once(launch: Launch) -> None:
    server = launch(*SLOW, "--shutdown-timeout", "0")
    thread, lines = stream(server, 4000, threading.Event())
    assert server.terminate() == 0
    thread.join(30)
    assert not any('"finish_reason":"length"' in line for line in lines), "80 s of tokens were cut short"


def test_second_signal_ends_at_once(launch: Launch) -> None:
    server = launch(*SLOW)
    stream(server, 4000, threading.Event())
    server.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    started = time.monotonic()
    assert server.terminate(15) == 0
    assert time.monotonic() - started < 15


def test_killed_engine_gives_streams_an_error_event_and_the_server_exits_3(launch: Launch) -> None:
    server = launch(*SLOW, "--exit-on-engine-death")
    thread, lines = stream(server, 4000, threading.Event())
    engine = server.engine_pid()
    os.kill(engine, signal.SIGKILL)
    thread.join(10)
    assert lines[-2] == "data: [DONE]"
    assert '"code":503' in lines[-4]
    assert server.process.wait(20) == 3
    assert "the engine died" in server.log()


def test_engine_ends_when_the_server_is_killed(launch: Launch) -> None:
    server = launch(*SLOW)
    engine = Path(f"/proc/{server.engine_pid()}")
    server.process.kill()
    server.process.wait()
    deadline = time.monotonic() + 10
    while engine.exists() and "Z" not in (engine / "stat").read_text().split(") ")[1][:1]:
        assert time.monotonic() < deadline, "an engine without a server must not stay"
        time.sleep(0.05)


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
        timeout=120,
        check=False,
    )


def test_port_in_use_is_one_readable_line_and_exit_code_1() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", "--simulate", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert done.stderr.startswith("nvfp4: cannot listen on 127.0.0.1 port")
    assert done.stderr.count("\n") == 1


def test_port_of_a_running_server_is_refused_like_any_other(simulated: LiveServer) -> None:
    done = run("serve", "--simulate", "--port", simulated.url.rsplit(":", 1)[1])
    assert done.returncode == 1
    assert done.stderr.startswith("nvfp4: cannot listen on 127.0.0.1 port")
    assert "--port" in done.stderr


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--max-model-len", "0"), ("--max-num-seqs", "-1"), ("--max-queued-requests", "-1"), ("--num-kv-blocks", "1")],
)
def test_count_that_no_engine_can_work_with_is_one_line_and_exit_code_1(flag: str, value: str) -> None:
    done = run("serve", "--simulate", "--port", "0", flag, value)
    assert done.returncode == 1
    # where progress is not a terminal's, phases that began are lines of their own
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith("loading: "))
    assert line.startswith(f"nvfp4: {flag} is {value}; expected at least "), done.stderr


def test_missing_model_is_exit_code_1_and_names_the_flag() -> None:
    done = run("serve", "/nowhere/model")
    assert done.returncode == 1
    assert done.stderr == (
        "nvfp4: there is no model folder /nowhere/model; give a local folder, or --allow-download to fetch a hub id\n"
    )


def test_unreadable_checkpoint_is_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer()._raw.to_str())
    (tmp_path / "config.json").write_text("{")
    done = run("serve", str(tmp_path), "--port", "0")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "config.json" in done.stderr.splitlines()[-1]


def test_flags_come_from_the_environment_and_the_command_line_wins(launch: Launch) -> None:
    env = {"NVFP4_SIMULATE": "1", "NVFP4_MAX_NUM_SEQS": "3", "NVFP4_SERVED_MODEL_NAME": "named"}
    server = launch("--max-model-len", "64", env=env | {"NVFP4_MAX_MODEL_LEN": "32"})
    assert "3 requests and" in server.output()
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "named"
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"] == 64
    assert server.terminate() == 0
