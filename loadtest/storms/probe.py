"""How fast a request is answered during a storm, sent by a process of its own: the storm's own client is busy."""

from __future__ import annotations

import http.client
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Iterator
from contextlib import contextmanager

INTERVAL_SECONDS = 0.02
TIMEOUT_SECONDS = 10.0  # what was not answered by then counts as having taken that long


class Probe:
    """`seconds` holds one entry per question once the block has ended; `failures` those not answered with 200."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.failures = 0


def _ask_on(port: int, path: str, body: str | None, stop: multiprocessing.connection.Connection) -> None:
    seconds: list[float] = []
    failures = 0
    stop.send("begun")
    while not stop.poll(INTERVAL_SECONDS):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
        started = time.perf_counter()
        try:
            headers = {"content-type": "application/json"}
            connection.request("GET" if body is None else "POST", path, body, headers if body else {})
            reply = connection.getresponse()
            reply.read()
            failures += reply.status != 200
        except (OSError, http.client.HTTPException):
            failures += 1
        seconds.append(time.perf_counter() - started)
        connection.close()
    stop.send((seconds, failures))


@contextmanager
def probing(port: int, path: str = "/health", body: str | None = None) -> Iterator[Probe]:
    """GET `path`, or POST `body` to it, INTERVAL_SECONDS after each answer and each time on a new connection, until the
    block ends.
    """
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_ask_on, args=(port, path, body, there), daemon=True)
    process.start()
    here.recv()
    probe = Probe()
    try:
        yield probe
    finally:
        here.send("stop")
        probe.seconds, probe.failures = here.recv()
        process.join()
