"""The streaming client tells the truth about a server whose every delay is known."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from loadtest.client import complete_together

FIRST, GAP = 0.15, 0.05


class Scripted(BaseHTTPRequestHandler):
    """First token after FIRST seconds, the others GAP apart, the last two in one chunk. prompt[0] picks a fault."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert all(body[name] is True for name in ("stream", "ignore_eos", "return_token_ids"))
        assert body["temperature"] == 0
        fault = body["prompt"][0]
        if fault == 400:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "no such thing"}}')
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        time.sleep(FIRST)
        num_tokens = body["max_tokens"] - (fault == 1)
        for i in range(num_tokens - 1):
            ids = [5, 6] if i == num_tokens - 2 else [5]
            self.event({"choices": [{"index": 0, "text": "", "token_ids": ids}]})
            time.sleep(GAP)
        if fault == 2:
            self.event({"error": {"message": "engine died"}})
        self.event({"choices": [], "usage": {}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, message: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(message).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def complete(url: str, prompts: list[list[int]], max_tokens: int):
    async def run():
        async with httpx.AsyncClient(base_url=url) as client:
            return await complete_together(client, "m", prompts, max_tokens)

    return asyncio.run(run())


def test_arrival_times_and_counts_are_those_of_the_server(url):
    streams = complete(url, [[9, 9], [9], [9]], 6)
    for stream in streams:
        assert [count for _, count in stream.arrivals] == [1, 1, 1, 1, 2]
        # sleep() never returns early; how late it returns is the machine's affair, and no test of ours
        assert stream.first_seconds >= FIRST
        assert stream.last_seconds - stream.first_seconds >= 3 * GAP
        assert stream.last_seconds >= FIRST + 4 * GAP
        assert stream.tokens_after(stream.first_seconds) == 5
        assert stream.tokens_after(0) == stream.num_tokens == 6


@pytest.mark.parametrize(
    ("fault", "message"), [(400, "HTTP 400.*no such thing"), (1, "asked for 6 tokens.*brought 5"), (2, "engine died")]
)
def test_a_failed_request_fails_the_measurement(url, fault, message):
    with pytest.raises(RuntimeError, match=message):
        complete(url, [[9], [fault]], 6)
