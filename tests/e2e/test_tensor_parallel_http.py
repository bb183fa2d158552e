"""`nvfp4 serve --tensor-parallel-size 2`: answers, a rank that is killed, ranks that others started."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import REPOSITORY, Launch, LiveServer
from tests.e2e.test_faults import Streams, complete, is_gone, status, until
from tests.tiny import tiny_llama

FLAGS = ("--dtype", "float32", "--device", "cpu", "--threads", "1", "--num-kv-blocks", "65", "--no-self-test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model", seed=5, eos_token_id=None)


@pytest.fixture(scope="module")
def alone(launch: Launch, folder: Path) -> Iterator[str]:
    """What one process says."""
    server = launch(str(folder), *FLAGS)
    yield complete(server, "hello", 12).json()["choices"][0]["text"]
    server.kill()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_pids(server: LiveServer) -> list[int]:
    return [
        pid
        for pid in children(server.engine_pid())
        if "nvfp4_runtime.engine.rank" in Path(f"/proc/{pid}/cmdline").read_text()
    ]


def listening_addresses(pid: int) -> set[str]:
    """Where a process listens, IPv4 and IPv6, as hexadecimal in /proc/net."""
    links = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in links:
                found.add(fields[1].partition(":")[0])
    return found


def test_a_killed_rank_is_seen_at_once_and_the_whole_engine_replaced(launch: Launch, folder: Path, alone: str) -> None:
    server = launch(str(folder), *FLAGS, "--tensor-parallel-size", "2")
    assert "2 share every layer" in server.output()
    assert complete(server, "hello", 12).json()["choices"][0]["text"] == alone
    engine, (rank,) = server.engine_pid(), rank_pids(server)
    loopback = "0100007F"
    assert listening_addresses(engine) | listening_addresses(rank) == {loopback}

    streams = Streams(server, ["a", "b"], max_tokens=400)
    streams.all_running()
    os.kill(rank, signal.SIGKILL)
    assert until(lambda: status(server, "/health/ready") == 503) < 10
    streams.join()
    assert all("engine" in str(streams.error(prompt)) for prompt in streams.events)
    until(lambda: is_gone(engine) and is_gone(rank), 5)
    until(lambda: status(server, "/health/ready") == 200, 60)
    assert complete(server, "hello", 12).json()["choices"][0]["text"] == alone
    # the thread that waits for the process sees it, or the step whose connection closes, whichever comes first
    assert re.search(r"rank 1 \(pid \d+\) was ended by signal 9|a step failed on rank 0 of 2", server.log())

    left = [server.engine_pid(), *rank_pids(server)]
    os.kill(left[1], signal.SIGKILL)  # and while nobody asks for anything
    assert until(lambda: status(server, "/health/ready") == 503) < 10
    until(lambda: bool(children(server.process.pid) and rank_pids(server)))  # others are being started
    left += [server.engine_pid(), *rank_pids(server)]
    server.kill()  # the server itself, without a word: nothing of it stays
    until(lambda: all(map(is_gone, left)), 10)


def follower(folder: Path, place: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "server.cli", "serve", str(folder), *FLAGS, "--tensor-parallel-size", "2"]
    return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | place | {"RANK": "1"})


@pytest.fixture
def place() -> dict[str, str]:
    """Where ranks meet, as torchrun says it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_ranks_that_others_started_meet_and_die_together(
    launch: Launch, folder: Path, alone: str, place: dict[str, str]
) -> None:
    rank = follower(folder, place)
    server = launch(str(folder), *FLAGS, "--tensor-parallel-size", "2", env=place | {"RANK": "0"})
    assert complete(server, "hello", 12).json()["choices"][0]["text"] == alone
    assert rank_pids(server) == [], "none was started here"
    assert listening_addresses(server.engine_pid()) == {"0100007F"}, "the store listens where it was told"
    rank.kill()
    assert server.process.wait(10) == 3, "whoever started the ranks has to start all of them anew"
    rank.wait()


@pytest.mark.slow
def test_ranks_that_others_started_end_well_together(launch: Launch, folder: Path, place: dict[str, str]) -> None:
    rank = follower(folder, place)
    server = launch(str(folder), *FLAGS, "--tensor-parallel-size", "2", env=place | {"RANK": "0"})
    rank.send_signal(signal.SIGTERM)  # a cluster tells all pods of a group; this one waits for the first
    assert complete(server, "hello", 4).status_code == 200
    assert server.terminate() == 0
    assert rank.wait(10) == 0
