"""Templates that come with a request: compiled and rendered in a process of their own, which can be ended.

Unlike a checkpoint's template, these are a stranger's program. The limits of template_limits.py hold there too; what
gets past them ends with the process, which has little memory and little time. It is started when first needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from nvfp4_runtime.errors import InvalidParameterError, UnsupportedFormatError
from nvfp4_runtime.text.chat_template import ChatTemplate

RENDER_SECONDS = 3.0
START_SECONDS = 30.0
MEMORY_BYTES = 1 << 30
_HEADER_BYTES = 8


@dataclass
class Answer:
    """What the process says of a template: the variables it reads, or the text it made; or why there is none."""

    variables: tuple[str, ...] = ()
    text: str = ""
    error: str | None = None
    param: str | None = None


class Confinement:
    """The other end of the process. One template at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, source: str, special_tokens: Mapping[str, str], rendering: Mapping[str, Any] | None) -> Answer:
        """Compile `source` and, if `rendering` holds the arguments of ChatTemplate.render, render it."""
        with self._lock:
            try:
                process = self._start()
                _write(process.stdin, json.dumps((source, special_tokens, rendering)).encode())
                answer = _read(process.stdout, RENDER_SECONDS)
            except TimeoutError:
                self._end()
                return Answer(error=f"the chat template took longer than {RENDER_SECONDS:g} seconds")
            except (BrokenPipeError, EOFError):
                self._end()
                return Answer(error="the chat template needs more memory than it may have, or is nested too deep")
            return Answer(**json.loads(answer))

    def close(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # what it did not read is of no use to anybody
                    pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            # -P: modules of the working directory must not take the place of ours
            command = [sys.executable, "-P", "-m", "nvfp4_runtime.text.confined"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            _read(self._process.stdout, START_SECONDS)
        return self._process


CONFINEMENT = Confinement()


class ConfinedTemplate(ChatTemplate):
    """As ChatTemplate, for one unnamed template. Takes up to RENDER_SECONDS: not for the event loop."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.sources = {"default": source}
        self.source = source
        self._special_tokens = dict(special_tokens)
        answer = CONFINEMENT.ask(source, self._special_tokens, None)
        if answer.error is not None:
            raise UnsupportedFormatError(answer.error)
        self.variables = frozenset(answer.variables)

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        answer = CONFINEMENT.ask(self.source, self._special_tokens, {"messages": messages, **options})
        if answer.error is not None:
            raise InvalidParameterError(answer.error, answer.param or "chat_template")
        return answer.text


def _write(pipe: IO[bytes] | None, payload: bytes) -> None:
    assert pipe is not None
    pipe.write(len(payload).to_bytes(_HEADER_BYTES, "little") + payload)
    pipe.flush()


def _read(pipe: IO[bytes] | None, seconds: float | None = None) -> bytes:
    """One frame. TimeoutError after `seconds`, EOFError when the other side is gone."""
    assert pipe is not None
    deadline = None if seconds is None else time.monotonic() + seconds
    header = _read_exactly(pipe, _HEADER_BYTES, deadline)
    return _read_exactly(pipe, int.from_bytes(header, "little"), deadline)


def _read_exactly(pipe: IO[bytes], size: int, deadline: float | None) -> bytes:
    found = bytearray()
    while len(found) < size:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        poll = select.poll()  # select takes no file from 1024 on, and each connection is one
        poll.register(pipe, select.POLLIN)
        if not poll.poll(None if left is None else left * 1000):
            raise TimeoutError
        part = os.read(pipe.fileno(), size - len(found))
        if not part:
            raise EOFError
        found += part
    return bytes(found)


def _answer(payload: bytes) -> Answer:
    source, special_tokens, rendering = json.loads(payload)
    try:
        template = ChatTemplate(source, special_tokens)
        text = "" if rendering is None else template.render(rendering.pop("messages"), **rendering)
    except InvalidParameterError as error:
        return Answer(error=str(error), param=error.param)
    except UnsupportedFormatError as error:
        return Answer(error=str(error))
    return Answer(tuple(template.variables), text)


def _limit_time() -> None:
    """Have the system end this process a little after the other side would: it may be gone by then."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime + RENDER_SECONDS) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # the server decides; its end closes our stdin
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(EOFError, BrokenPipeError):
        _write(sys.stdout.buffer, b"")
        while True:
            payload = _read(sys.stdin.buffer)
            _limit_time()
            answer = _answer(payload)
            _write(sys.stdout.buffer, json.dumps(asdict(answer)).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
