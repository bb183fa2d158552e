"""Live servers for end-to-end tests: `nvfp4 serve` in a process of its own, on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

REPOSITORY = Path(__file__).parents[2]
READY_SECONDS = 120.0  # a real model on a machine that is shared


class LiveServer:
    """A running `nvfp4 serve`. `url` is where it listens; what it printed is in `output()` and `log()`."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None) -> None:
        self._stdout = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the server
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "serve", "--port", "0", *flags],
            cwd=REPOSITORY,
            stdout=self._stdout,
            stderr=self._stderr,
            env=os.environ | {"NVFP4_DRAIN_DELAY": "0"} | (env or {}),
        )
        try:
            self.url = self._wait_ready()
        except BaseException:
            self.kill()
            raise

    def _wait_ready(self) -> str:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            found = re.search(r"address +(http://\S+)", self.output()) or re.search(r'"url": "(\S+)"', self.log())
            if found:
                return found.group(1)
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log()}")
            time.sleep(0.02)
        raise TimeoutError(f"the server was not ready after {READY_SECONDS} s:\n{self.log()}")

    def output(self) -> str:
        return _content(self._stdout)

    def log(self) -> str:
        return _content(self._stderr)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics without labels but its own: name{labels} -> value."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    def metric(self, name: str) -> float:
        (value,) = (value for key, value in self.metrics().items() if key.startswith(name + "{"))
        return value

    def assert_idle(self, seconds: float = 5.0) -> None:
        """Nothing runs, nothing waits, and every KV block is back, within `seconds`."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "nvfp4_kv_cache_used_blocks")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = {name: self.metric(name) for name in names}
            if not any(state.values()):
                return
            time.sleep(0.02)
        raise AssertionError(f"not idle after {seconds} s: {state}")

    def engine_pid(self) -> int:
        (pid,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(pid)

    def terminate(self, seconds: float = 40.0) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _content(file: Any) -> str:
    # pread: the child writes through the same open file, whose position we must not move
    return os.pread(file.fileno(), 1 << 20, 0).decode("utf-8", "replace")


Launch = Callable[..., LiveServer]


@pytest.fixture(scope="session")
def launch() -> Iterator[Launch]:
    """launch(*flags) starts a server that ends with the test session, if not before."""
    with ExitStack() as stack:

        def start(*flags: str, **options: Any) -> LiveServer:
            server = LiveServer(*flags, **options)
            stack.callback(server.kill)
            return server

        yield start


@pytest.fixture(scope="session")
def simulated(launch: Launch) -> LiveServer:
    """A server on the simulated engine: real processes, scheduler and block pool, no model.

    8 requests at a time, so that more of them queue; 2 ms a step, so that there is time to leave.
    """
    return launch("--simulate", "--max-num-seqs", "8", "--num-kv-blocks", "400", "--simulate-step-seconds", "0.002")
