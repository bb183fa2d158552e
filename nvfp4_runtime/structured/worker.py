"""A process that tries a grammar before the engine does: what runs away or overflows a stack there ends nothing else.

Started by GrammarTrial as `python -m nvfp4_runtime.structured.worker`; frames of msgpack on stdin and stdout. Each
grammar is tried in a fork of it, so that the next one finds the tokenizer read and a heap that nobody has filled.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import msgspec

from nvfp4_runtime.errors import InvalidParameterError
from nvfp4_runtime.process import die_with_parent
from nvfp4_runtime.structured.compiler import GrammarCompiler, Vocabulary
from nvfp4_runtime.structured.spec import StructuredSpec

TRIAL_CPU_SECONDS = 1.0  # the engine compiles it once more: 2 s in all
TRIAL_SECONDS = 8.0  # by the clock, where other work takes the cores or the process hangs
START_SECONDS = 60.0
NICENESS = 10  # the event loop and the steps go first
MEMORY_BYTES = 4 << 30  # of address space, the interpreter's and the library's own included
STACK_BYTES = 4 << 20  # half of what the engine's threads have: what fits here fits there
TOO_MUCH = "is beyond what the compiler can take: it is nested too deep or needs too much memory"
TOO_LONG = f"needs more than {TRIAL_CPU_SECONDS:g} s of a core to compile; simplify it"
_HEADER_BYTES = 4
_encode = msgspec.msgpack.encode


class GrammarTrial:
    """The other end: starts the process when first asked, ends it when it takes too long, starts it anew after that."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, spec: StructuredSpec) -> str | None:
        """Why `spec` cannot be used, or None. One at a time."""
        with self._lock:
            try:
                process = self._start()
                _write(process.stdin, _encode(spec))
                answer = _read(process.stdout, TRIAL_SECONDS)
            except TimeoutError:
                self.close()
                return f"takes longer than {TRIAL_SECONDS:.0f} s to compile; simplify it"
            except (BrokenPipeError, EOFError):
                self.close()
                return TOO_MUCH
            return msgspec.msgpack.decode(answer, type=str | None)

    def close(self) -> None:
        """End the process, whatever it does."""
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
            self.close()
            # -P: modules of the working directory must not take the place of ours
            command = [sys.executable, "-P", "-m", "nvfp4_runtime.structured.worker"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            _write(self._process.stdin, _encode(_as_message(self._vocabulary)))
            _read(self._process.stdout, START_SECONDS)
        return self._process


class _Message(msgspec.Struct):
    """A Vocabulary on its way."""

    size: int
    eos_token_ids: tuple[int, ...]
    tokenizer: str | None
    tokens: tuple[bytes, ...]
    special: tuple[int, ...]


def _as_message(vocabulary: Vocabulary) -> _Message:
    path = None if vocabulary.tokenizer is None else str(vocabulary.tokenizer)
    return _Message(vocabulary.size, vocabulary.eos_token_ids, path, vocabulary.tokens, vocabulary.special)


def _write(pipe: IO[bytes] | None, payload: bytes) -> None:
    assert pipe is not None
    pipe.write(len(payload).to_bytes(_HEADER_BYTES, "little") + payload)
    pipe.flush()


def _read(pipe: IO[bytes] | None, seconds: float | None = None) -> bytes:
    """One frame. TimeoutError after `seconds`, EOFError when the other side is gone."""
    assert pipe is not None
    if seconds is not None and not select.select([pipe], [], [], seconds)[0]:
        raise TimeoutError
    header = pipe.read(_HEADER_BYTES)
    payload = pipe.read(int.from_bytes(header, "little")) if len(header) == _HEADER_BYTES else b""
    if len(header) < _HEADER_BYTES:
        raise EOFError
    return payload


def _serve() -> None:
    """Compile what comes, take the first mask, say what was wrong."""
    message = msgspec.msgpack.decode(_read(sys.stdin.buffer), type=_Message)
    path = None if message.tokenizer is None else Path(message.tokenizer)
    vocabulary = Vocabulary(message.size, message.eos_token_ids, path, message.tokens, message.special)
    compiler = GrammarCompiler(vocabulary, cache_bytes=0)
    failure: str | None = None
    try:
        compiler.warm_up()
    except InvalidParameterError as error:  # no library, or a tokenizer it does not take: the same for every grammar
        failure = str(error)
    _write(sys.stdout.buffer, b"")
    while True:
        spec = msgspec.msgpack.decode(_read(sys.stdin.buffer), type=StructuredSpec)
        _write(sys.stdout.buffer, _encode(failure or _in_a_fork(compiler, spec)))


def _in_a_fork(compiler: GrammarCompiler, spec: StructuredSpec) -> str | None:
    """Why `spec` cannot be used, or None, as another process finds it within its bounds."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        die_with_parent()
        # Nobody handles the signal, so it ends the process in the midst of anything.
        signal.setitimer(signal.ITIMER_PROF, TRIAL_CPU_SECONDS)
        threading.stack_size(STACK_BYTES)  # of new threads; the first one's is not ours to bound
        thread = threading.Thread(target=lambda: os.write(writing, _encode(_tried(compiler, spec))))
        thread.start()
        thread.join()
        os._exit(0)  # what the parent would do at its end is not to be done twice
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return TOO_LONG if os.WTERMSIG(status) == signal.SIGPROF else TOO_MUCH
    return msgspec.msgpack.decode(answer, type=str | None) if answer else TOO_MUCH


def _tried(compiler: GrammarCompiler, spec: StructuredSpec) -> str | None:
    try:
        compiler.state(spec)
    except InvalidParameterError as error:
        return str(error).removeprefix(f"{spec.param} ")
    return None


def main() -> int:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine decides; its end closes our stdin
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(EOFError, BrokenPipeError):
        _serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
