"""The HTTP benchmark counts what was sent, notices errors, and its whole course runs."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from loadtest.bench_http.__main__ import main
from loadtest.bench_http.lag import lag_p99_ms
from loadtest.bench_http.raw_client import request_bytes, run_requests, run_streams

HEAD = b"HTTP/1.1 200 OK\r\n"


@contextmanager
def answering(*parts: bytes, pause: float = 0.002) -> Iterator[int]:
    """A server that reads a request and answers `parts`, a pause between them; yields its port."""
    loop = asyncio.new_event_loop()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"{}"):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)

    async def contain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = loop.run_until_complete(asyncio.start_server(contain, "127.0.0.1", 0, family=socket.AF_INET))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def test_events_are_counted_wherever_reads_cut_them():
    parts = [HEAD + b"\r\n", b"data: 1\n", b"\ndata: 2\n\nda", b"ta: 3\n\ndata: [DO", b"NE]\n\n"]
    with answering(*parts) as port:
        run = run_streams(port, request_bytes("/", b"{}"), 3)
    assert run.num_events == 9
    assert len(run.first_ms) == 3


def test_an_error_status_is_raised():
    answer = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nfull"
    with answering(answer) as port:
        with pytest.raises(RuntimeError, match="429"):
            run_streams(port, request_bytes("/", b"{}"), 1)
        with pytest.raises(RuntimeError, match="429"):
            run_requests(port, request_bytes("/", b"{}"), 1, 2)


def test_every_short_request_is_answered_once():
    with answering(HEAD + b"content-length: 5\r\n\r\n12", b"345", pause=0.0005) as port:
        finished = run_requests(port, request_bytes("/", b"{}"), 4, 25)
    assert len(finished) == 25
    assert finished == sorted(finished)


def test_lag_is_the_bucket_of_the_99th_percentile():
    before = {0.001: 10.0, 0.01: 10.0, float("inf"): 10.0}
    assert lag_p99_ms(before, {0.001: 108.0, 0.01: 109.0, float("inf"): 110.0}) == 10.0
    assert lag_p99_ms(before, before) is None


def test_the_whole_benchmark_runs(tmp_path):
    shown: list[str] = []
    flags = ["--rounds", "1", "--streams", "2", "--tokens", "5", "--requests", "40", "--step-seconds", "0.001"]
    main([*flags, "--json", str(tmp_path / "r.json")], shown.append)
    record = json.loads((tmp_path / "r.json").read_text())
    assert [(s["side"], s["tokens"]) for s in record["streams"]] == [("nvfp4", 10), ("bare uvicorn", 10)]
    assert all(s["cpu_seconds"] > 0 for s in record["streams"] + record["short"])
    assert "| 2 | nvfp4 |" in shown[0]
