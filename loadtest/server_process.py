"""A server as a child process, for as long as a measurement needs it: `nvfp4 serve`, or another with a /health."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Server:
    """Where it answers, its process, and the seconds from exec until it was waited for no longer.

    started  time.monotonic() at exec
    """

    url: str
    pid: int
    ready_seconds: float
    started: float


def nvfp4_program() -> str:
    """The `nvfp4` command of the environment that runs us."""
    return str(Path(sys.executable).with_name("nvfp4"))


@contextmanager
def serving(arguments: Sequence[str], environment: dict[str, str], ready_seconds: float, log: Path) -> Iterator[str]:
    """Start `nvfp4 serve ARGUMENTS` on a free port, wait until /health answers 200, yield its base URL, stop it.

    Raises RuntimeError with the end of the server's log when it dies or is not ready in `ready_seconds`.
    """
    with nvfp4_server(arguments, environment, ready_seconds, log) as server:
        yield server.url


@contextmanager
def nvfp4_server(
    arguments: Sequence[str], environment: dict[str, str], ready_seconds: float, log: Path, port: int | None = None
) -> Iterator[Server]:
    """As `serving`, with what is known of the process. `port` None: a free one."""
    command = [nvfp4_program(), "serve", *arguments]
    with running(lambda port: [*command, "--port", str(port)], environment, ready_seconds, log, port=port) as server:
        yield server


@contextmanager
def listening_server(
    arguments: Sequence[str], environment: dict[str, str], ready_seconds: float, log: Path
) -> Iterator[Server]:
    """As `nvfp4_server`, but there as soon as its port listens: what it is asked waits until the model is loaded."""
    command = [nvfp4_program(), "serve", *arguments]
    with running(lambda port: [*command, "--port", str(port)], environment, ready_seconds, log, _listens) as server:
        yield server


@contextmanager
def running(
    command: Callable[[int], Sequence[str]],
    environment: dict[str, str],
    ready_seconds: float,
    log: Path,
    is_ready: Callable[[httpx.Client], bool] | None = None,
    port: int | None = None,
) -> Iterator[Server]:
    """Start `command(port)` and wait until `is_ready(client)`; stop it afterwards. Errors as `serving`.

    is_ready  None: its /health answers 200
    port      None: a free one
    """
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            command(port),
            env=os.environ | {"NVFP4_DRAIN_DELAY": "0"} | environment,  # no load balancer follows us
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, url, ready_seconds, log, is_ready or _is_healthy)
        yield Server(url, process.pid, time.monotonic() - started, started)
    finally:
        _stop(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(
    process: subprocess.Popen[bytes],
    url: str,
    ready_seconds: float,
    log: Path,
    is_ready: Callable[[httpx.Client], bool],
) -> None:
    deadline = time.monotonic() + ready_seconds
    with httpx.Client(base_url=url, timeout=2) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with code {process.returncode}:\n{_tail(log)}")
            if is_ready(client):
                return
            time.sleep(POLL_SECONDS)
    raise RuntimeError(f"the server was not ready within {ready_seconds:.0f} s:\n{_tail(log)}")


def _is_healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:  # not listening yet
        return False


def _listens(client: httpx.Client) -> bool:
    try:
        socket.create_connection((client.base_url.host, client.base_url.port), timeout=2).close()
    except ConnectionRefusedError:
        return False
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])
