"""Bounds on connections, against a server in a process of its own: sizes, times, slow readers, floods."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loadtest.overload import measure
from tests.e2e.conftest import Launch, LiveServer

BODY = json.dumps({"prompt": "Hi", "max_tokens": 2}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def limited(launch: Launch) -> LiveServer:
    """Short times, so that tests need not wait for the defaults."""
    return launch(
        "--simulate", "--header-timeout", "1", "--body-timeout", "1", "--slow-reader-timeout", "1", "--max-body-size",
        "100K", "--max-num-seqs", "4", "--max-queued-requests", "4", "--metrics-port", "0", "--stream-buffer", "64K",
    )  # fmt: skip


class Connection:
    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.sock = socket.create_connection((host, int(port)), timeout=10)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def rest(self) -> bytes:
        """Everything until the server closes. A reset counts as a close."""
        found = b""
        try:
            while data := self.sock.recv(1 << 16):
                found += data
        except ConnectionResetError:
            pass
        self.sock.close()
        return found


@pytest.fixture
def connection(limited: LiveServer) -> Iterator[Connection]:
    made = Connection(limited.url)
    yield made
    made.sock.close()


def status(answer: bytes) -> int:
    return int(answer.split()[1]) if answer else 0


def rss(server: LiveServer) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def test_cve_2025_48956_headers_without_end_get_a_431_and_fill_no_memory(limited: LiveServer) -> None:
    before = rss(limited)
    for begin, unit in ((b"x-a: ", b"a" * 65536), (b"", b"x-b: " + b"b" * 100 + b"\r\n"), (b"x-c", b"c" * 65536)):
        connection = Connection(limited.url)
        connection.send(POST + begin)
        started = time.monotonic()
        with pytest.raises(OSError):  # noqa: PT012 - whichever of them the server does not take any more
            while time.monotonic() - started < 8:
                connection.send(unit * (1 + (1 << 16) // len(unit)))
        connection.sock.close()
    assert rss(limited) - before < 16 << 20
    assert httpx.get(f"{limited.url}/health").status_code == 200


@pytest.mark.parametrize(
    "head", [b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n", POST + b"x: " + b"a" * 70_000 + b"\r\n\r\n"]
)
def test_long_heads_get_an_answer_that_is_openais(connection: Connection, head: bytes) -> None:
    connection.send(head)
    answer = connection.rest()
    assert status(answer) == 431
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == 431


def test_what_the_port_refuses_has_an_id_and_is_counted(limited: LiveServer) -> None:
    def counted(code: str) -> float:
        return limited.metrics().get(f'nvfp4_http_responses_total{{code="{code}"}}', 0)

    for sent, code in ((b"GET /" + b"a" * 70_000, "431"), (POST, "408"), (b"\0\1 nonsense\r\n\r\n", "400")):
        before = counted(code)
        connection = Connection(limited.url)
        connection.send(sent)
        answer = connection.rest()
        assert status(answer) == int(code)
        assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", answer)
        assert counted(code) == before + 1


def test_heads_within_the_bound_pass(connection: Connection) -> None:
    connection.send(
        POST + b"x: " + b"a" * 60_000 + b"\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY
    )
    assert status(connection.rest()) == 200


def test_trailers_are_bounded_and_are_no_headers(limited: LiveServer) -> None:
    connection = Connection(limited.url)
    chunked = b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    connection.send(POST + chunked + b"x-request-id: from-a-trailer\r\n\r\n")
    answer = connection.rest()
    assert status(answer) == 200
    assert b"from-a-trailer" not in answer
    connection = Connection(limited.url)
    connection.send(POST + chunked.replace(b"connection: close\r\n", b"") + b"x: " + b"a" * 200_000)
    assert status(connection.rest()) in (0, 431)


def test_slow_heads_get_a_408_and_silence_is_closed(limited: LiveServer) -> None:
    for sent, expected in ((POST, 408), (b"", 0), (b"\r\n", 0), (b"G", 408)):
        connection = Connection(limited.url)
        connection.send(sent)
        started = time.monotonic()
        answer = connection.rest()
        assert status(answer) == expected, (sent, answer)
        assert time.monotonic() - started < 5


def test_a_byte_now_and_then_does_not_keep_a_connection(limited: LiveServer) -> None:
    connections = [Connection(limited.url) for _ in range(100)]
    started = time.monotonic()
    left = list(connections)
    for connection in connections:
        connection.send(POST)
    while left and time.monotonic() - started < 8:
        time.sleep(0.2)
        for connection in list(left):
            try:
                connection.send(b"x: y\r\n")
            except OSError:
                left.remove(connection)
    assert not left
    assert httpx.get(f"{limited.url}/health").status_code == 200


def test_slow_bodies_get_a_408(limited: LiveServer) -> None:
    for framing in (b"content-length: 1000\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"):
        connection = Connection(limited.url)
        connection.send(POST + framing)
        answer = connection.rest()
        assert status(answer) == 408
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == 408
        assert b"x-request-id" in answer


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_get_a_413_that_arrives(limited: LiveServer, chunked: bool) -> None:
    content = iter([b"x" * 1000] * 120) if chunked else b"x" * 120_000
    response = httpx.post(
        f"{limited.url}/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 413


def test_a_body_that_goes_on_after_its_refusal_is_cut_off(connection: Connection) -> None:
    connection.send(POST + b"content-length: 8000000000\r\n\r\n")
    sent = 0
    with pytest.raises(OSError):  # noqa: PT012 - whichever of them the server does not take any more
        while sent < 1 << 28:
            connection.send(b"x" * 65536)
            sent += 65536
    assert sent < 1 << 26


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", b"GET /health\r\n\r\n", b"GET /health HTTP/2.0\r\n\r\n"]
)
def test_what_is_no_http_we_speak_gets_openais_error_object(connection: Connection, data: bytes) -> None:
    connection.send(data)
    answer = connection.rest()
    assert status(answer) == 400
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == 400


def test_streams_outlive_the_limits_on_their_requests(limited: LiveServer, launch: Launch) -> None:
    server = launch("--simulate", "--simulate-step-seconds", "0.02", "--header-timeout", "0.5", "--body-timeout", "0.5")
    body = {"prompt": "Hi", "max_tokens": 80, "stream": True, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in answer.text
    assert answer.elapsed.total_seconds() > 1.5
    server.kill()


def test_a_client_that_does_not_read_is_aborted(limited: LiveServer) -> None:
    connection = Connection(limited.url)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = json.dumps({"prompt": "Hi", "max_tokens": 4000, "logprobs": 20, "stream": True, "ignore_eos": True, "n": 4})
    connection.send(POST + b"content-length: %d\r\n\r\n" % len(body) + body.encode())
    deadline = time.monotonic() + 20
    while not limited.metric("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.01)
    limited.assert_idle(20)
    connection.sock.close()


def test_metrics_have_a_port_of_their_own_and_nothing_else_is_there(launch: Launch, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = launch("--simulate", "--api-key-file", str(keys), "--metrics-port", str(port))
    url = f"http://127.0.0.1:{port}"
    assert "vllm:num_requests_running" in httpx.get(f"{url}/metrics").text
    host = server.url.removeprefix("http://")
    for path in ("/v1/models", "/health", "/", "/docs", "/metrics/x"):
        assert httpx.get(f"{url}{path}", headers={"host": host}).status_code == 404
    assert httpx.get(f"{server.url}/metrics", headers={"host": f"127.0.0.1:{port}"}).status_code == 401
    server.kill()


def test_shadowmq_cve_2025_30165_and_32444_one_port_listens_and_it_speaks_http(simulated: LiveServer) -> None:
    inodes = set()
    for pid in (simulated.process.pid, simulated.engine_pid()):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry)):
                inodes.add(found[1])
    lines = [line.split() for name in ("tcp", "tcp6", "udp", "udp6")
             for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]  # fmt: skip
    listening = [line[1] for line in lines if line[9] in inodes and line[3] in ("0A", "07")]
    assert [int(address.split(":")[1], 16) for address in listening] == [int(simulated.url.rsplit(":", 1)[1])]
    assert listening[0].startswith("0100007F"), "and only this machine reaches it"


def test_overload_is_refused_within_bounds_and_nothing_is_lost(launch: Launch) -> None:
    server = launch(
        "--simulate", "--simulate-step-seconds", "0.01", "--max-num-seqs", "4", "--max-queued-requests", "8"
    )
    runs = asyncio.run(measure(int(server.url.rsplit(":", 1)[1]), [1, 10], 1.5, 10.0, 4, 8, seed=0))
    for run in runs:
        assert sum(run.statuses.values()) == run.requests
        assert set(run.statuses) <= {"200", "429"}
    assert runs[1].statuses["429"] > runs[1].statuses["200"] > 0
    assert runs[1].retry_after[0] >= 1
    assert runs[1].retry_after[1] <= 60
    server.assert_idle()
    server.kill()
