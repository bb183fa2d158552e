"""The engine's own process: messages in, steps, outputs out, until told to stop or the other side is gone.

Started by the client as `python -m nvfp4_runtime.engine.core FD`, FD being one end of a Unix socket pair.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from nvfp4_runtime.engine.engine import Engine
from nvfp4_runtime.engine.grammar_queue import GrammarQueue
from nvfp4_runtime.engine.logs import configure_logs
from nvfp4_runtime.engine.messages import (
    Abort,
    Beat,
    Failed,
    FromEngine,
    Outputs,
    Progress,
    Ready,
    Refused,
    Shutdown,
    Start,
    Submit,
    TokenOutput,
)
from nvfp4_runtime.engine.recovery import ENGINE_FAULT
from nvfp4_runtime.engine.torch_import import import_torch
from nvfp4_runtime.engine.wire import FrameBuffer, decode_to_engine, frame
from nvfp4_runtime.errors import CapacityError, NVFP4Error, RequestError
from nvfp4_runtime.process import die_with_parent, ignore_held_back

BEAT_SECONDS = 1.0

logger = logging.getLogger(__name__)
LOG_TEXT = "%(levelname)s engine: %(message)s"


class EngineCore:
    """The loop. It blocks on the socket only when there is nothing to compute."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames = FrameBuffer()
        self._stop = False
        self._compiling: GrammarQueue | None = None

    def run(self) -> int:
        """Serve until Shutdown or until the client is gone. Returns the process's exit code."""
        engine = self._load()
        if engine is None:
            return 2
        engine.on_long_step = lambda seconds: self._send(Beat(seconds))
        self._compiling = GrammarQueue(engine.grammars) if engine.grammars is not None else None
        while not self._stop:
            ended = self._handle_messages(engine, wait=not engine.has_work)
            if ended:
                self._send(Outputs(ended, engine.scheduler.stats()))
            if engine.has_work and not self._stop:
                outputs, stats = engine.step()
                self._send(Outputs(outputs, stats))
        return 0

    def _load(self) -> Engine | None:
        started = time.monotonic()
        start = self._receive_start()
        if start is None:
            return None
        configure_logs(start.config.log_format, start.log_level, LOG_TEXT, process="engine")
        gc.disable()  # a million objects are made now, and none of them is garbage
        try:
            engine = build(start, lambda phase, fraction: self._send(Progress(phase, fraction)))
        except NVFP4Error as error:
            self._send(Failed(type(error).__name__, str(error), getattr(error, "flag", None)))
            return None
        except OSError as error:  # a file of the model that the system does not give us
            logger.debug("where it came from", exc_info=True)
            where = "" if error.filename is None else f": {error.filename}"
            self._send(Failed("CheckpointError", f"{error.strerror or error}{where}; look at its owner and mode"))
            return None
        probed = time.monotonic()
        engine.executor.probe()
        engine.pace.observe(1, time.monotonic() - probed)
        gc.freeze()  # what was loaded stays; the collector need not walk it again in every step
        gc.enable()
        engine.info.pid = os.getpid()
        engine.info.startup_seconds["engine_total"] = time.monotonic() - started
        self._send(Ready(engine.info))
        return engine

    def _receive_start(self) -> Start | None:
        while data := self._sock.recv(1 << 16):
            for payload in self._frames.feed(data):
                message = decode_to_engine(payload)
                assert isinstance(message, Start), f"the first message must be Start, got {type(message).__name__}"
                return message
        return None

    def _handle_messages(self, engine: Engine, wait: bool) -> list[TokenOutput]:
        """Take what has arrived; with `wait`, until something does. Returns the outputs of aborted requests."""
        ended: list[TokenOutput] = []
        while not self._stop:
            sources, patience = self._sources()
            readable, _, _ = select.select(sources, [], [], patience if wait else 0)
            self._admit_compiled(engine)
            if wait and self._compiling and not readable:
                self._send(Beat())  # grammars are being compiled: that is progress, and bounded in time
            if self._sock not in readable:
                if wait and not engine.has_work:
                    continue
                break
            data = self._sock.recv(1 << 20)
            if not data:
                self._stop = True  # the server is gone, and with it everyone who waits for our tokens
                break
            for payload in self._frames.feed(data):
                self._handle(engine, payload, ended)
            wait = False
        return ended

    def _handle(self, engine: Engine, payload: bytes, ended: list[TokenOutput]) -> None:
        match decode_to_engine(payload):
            case Submit() as submit:
                if self._compiling is None or not self._compiling.takes(submit):
                    self._admit(engine, submit)
            case Abort(request_ids):
                outputs = (self._abort(engine, request_id) for request_id in request_ids)
                ended.extend(output for output in outputs if output is not None)
            case Shutdown():
                self._stop = True
            case Start():
                raise AssertionError("Start was sent twice")

    def _admit(self, engine: Engine, submit: Submit, failure: RequestError | None = None) -> None:
        """Hand a request to the engine, or tell the client why not; `failure`: why not, if that is known already."""
        try:
            if failure is not None:
                raise failure
            engine.add(submit)
        except (RequestError, CapacityError) as error:
            param = getattr(error, "param", None)
            self._send(Refused(submit.request_id, type(error).__name__, str(error), param))
        except Exception:
            logger.exception("request %s could not be added", submit.request_id)
            failed = TokenOutput(
                submit.request_id,
                [],
                finish_reason="error",
                error="the engine failed on this request; the server's log says why",
                error_code=ENGINE_FAULT,
            )
            self._send(Outputs([failed], engine.scheduler.stats()))

    def _admit_compiled(self, engine: Engine) -> None:
        for submit, failure in self._compiling.ready() if self._compiling else ():
            self._admit(engine, submit, failure)

    def _abort(self, engine: Engine, request_id: str) -> TokenOutput | None:
        if self._compiling is not None and self._compiling.drop(request_id):
            return TokenOutput(request_id, [], finish_reason="abort")
        return engine.abort(request_id)

    def _sources(self) -> tuple[list[socket.socket | GrammarQueue], float | None]:
        """What to listen to, and how long at most."""
        if not self._compiling:
            return [self._sock], None
        return [self._sock, self._compiling], min(self._compiling.seconds_left() or 0.0, BEAT_SECONDS)

    def _send(self, message: FromEngine) -> None:
        try:
            self._sock.sendall(frame(message))
        except (BrokenPipeError, ConnectionResetError):
            self._stop = True


def build(start: Start, progress: Callable[[str, float], None]) -> Engine:
    """The engine that `start` asks for; torch is imported only for a real model."""
    if start.config.simulated is not None:
        from nvfp4_runtime.engine.simulated import simulated_engine

        return simulated_engine(start.config)
    progress("import", 0.0)
    started = time.monotonic()
    import_torch()
    from nvfp4_runtime.engine.build import build_engine

    imported = time.monotonic() - started
    engine = build_engine(start.config, progress)
    engine.info.startup_seconds = {"import": imported, **engine.info.startup_seconds}
    return engine


def main() -> int:
    # Ctrl-C and most supervisors signal the whole process group; the server decides when the engine stops, and the
    # engine ends on its own as soon as the server's end of the socket is closed.
    die_with_parent()
    ignore_held_back()
    configure_logs("text", logging.WARNING, LOG_TEXT)
    inherited = int(sys.argv[1])  # as high as the server has files open, and select takes none from 1024 on
    sock = socket.socket(fileno=os.dup(inherited))
    os.close(inherited)
    core = EngineCore(sock)
    try:
        return core.run()
    except Exception as error:  # last resort: tell the server why before the process ends
        logger.exception("the engine failed")
        core._send(Failed(type(error).__name__, str(error)))
        return 3


def leave(code: int) -> NoReturn:
    """End the process now: the system takes memory and devices back faster than torch and the interpreter do."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
