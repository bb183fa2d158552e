"""How fast a request is answered during a storm, sent by a process of its own: the storm's own client is busy."""

from __future__ import annotations

import http.client
import json
import select
import subprocess
import sys
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


@contextmanager
def probing(port: int, path: str = "/health", body: str | None = None) -> Iterator[Probe]:
    """GET `path`, or POST `body` to it, INTERVAL_SECONDS after each answer and each time on a new connection, until the
    block ends.
    """
    command = [sys.executable, "-m", "loadtest.storms.probe", str(port), path, *([] if body is None else [body])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # it has begun
    probe = Probe()
    try:
        yield probe
    finally:
        told, _ = process.communicate("stop\n")
        found = json.loads(told)
        probe.seconds, probe.failures = found["seconds"], found["failures"]


def _ask(port: int, path: str, body: str | None) -> bool:
    """Whether the answer is a 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, body, {"content-type": "application/json"})
        reply = connection.getresponse()
        reply.read()
        return reply.status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _until_told(port: int, path: str, body: str | None) -> None:
    seconds: list[float] = []
    failures = 0
    print("begun", flush=True)
    while not select.select([sys.stdin], [], [], INTERVAL_SECONDS)[0]:
        started = time.perf_counter()
        failures += not _ask(port, path, body)
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": seconds, "failures": failures}))


if __name__ == "__main__":
    _until_told(int(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
