"""EngineClient: the engine as asyncio sees it. Admission is decided here; steps happen elsewhere. Torch-free."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Protocol

from nvfp4_runtime import errors
from nvfp4_runtime.config import EngineConfig
from nvfp4_runtime.engine.admission import Admission
from nvfp4_runtime.engine.engine import check_request
from nvfp4_runtime.engine.messages import (
    Abort,
    Beat,
    EngineInfo,
    Failed,
    Outputs,
    Pooling,
    Progress,
    Ready,
    Refused,
    Shutdown,
    Start,
    StepStats,
    Submit,
    ToEngine,
    TokenOutput,
)
from nvfp4_runtime.engine.token_stream import TokenStream
from nvfp4_runtime.engine.wire import FrameBuffer, decode_from_engine, frame
from nvfp4_runtime.errors import EngineDeadError, NVFP4Error, QueueFullError
from nvfp4_runtime.process import signals_held_back
from nvfp4_runtime.sampling.params import SamplingParams

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[str, float], None]
CLOSED = "the engine was closed"
_ENDED_LOADING = "the engine process ended while loading; its log above says why"
_SHUTDOWN_SECONDS = 5.0
PATIENCE = 3.0  # times what the engine expects a long step to take, before its silence counts
_DELIVERED_AT_ONCE = 64  # some 2 ms of writing: what a step of a thousand streams may delay everybody else by


class AsyncEngine(Protocol):
    """What the server needs of an engine.

    num_restarts  engine processes started after the first
    num_stalls    engine processes killed because they hung
    """

    info: EngineInfo
    stats: StepStats
    num_restarts: int
    num_stalls: int

    @property
    def admission(self) -> Admission: ...

    @property
    def alive(self) -> bool: ...

    @property
    def death_reason(self) -> str | None: ...

    @property
    def stalled_seconds(self) -> float:
        """How long requests have waited for any sign of progress, beyond what was announced; 0 while none is due."""
        ...

    def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        cache_salt: str = "",
        priority: int = 0,
        pooling: Pooling | None = None,
        tenant: str = "",
        adapter: str = "",
    ) -> TokenStream: ...

    def abort(self, request_id: str) -> None: ...

    def on_step(self, callback: Callable[[StepStats], None]) -> None: ...

    def on_output(self, callback: Callable[[TokenOutput], None]) -> None: ...

    def on_finish(self, callback: Callable[[TokenOutput], None]) -> None: ...

    async def close(self, reason: str = CLOSED) -> None:
        """Stop the engine. Streams still open end with EngineDeadError(reason)."""
        ...


class EngineClient:
    """One engine in its own process, over an inherited Unix socket."""

    num_restarts = 0
    num_stalls = 0

    def __init__(self, process: subprocess.Popen[bytes], writer: asyncio.StreamWriter, info: EngineInfo) -> None:
        self.info = info
        self.stats = StepStats(0, 0, info.num_blocks - 1, 0, info.num_blocks - 1)
        self._process = process
        self._writer = writer
        self.admission = Admission.of(info)
        self._streams: dict[str, TokenStream] = {}
        self._death: str | None = None
        self._closed_because: str | None = None
        self._last_progress = time.monotonic()
        self._announced_seconds = 0.0
        self.dead = asyncio.Event()
        self._unsent = bytearray()
        self._on_step: list[Callable[[StepStats], None]] = []
        self._on_output: list[Callable[[TokenOutput], None]] = []
        self._on_finish: list[Callable[[TokenOutput], None]] = []
        self._reader_task: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------------------------

    @classmethod
    async def launch(cls, config: EngineConfig, on_progress: ProgressCallback | None = None) -> EngineClient:
        """Start the process and wait until it is ready. Raises what the engine raised while loading."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs, signals_held_back():
            process = subprocess.Popen(
                # -P: modules of the working directory must not take the place of ours
                [sys.executable, "-P", "-m", "nvfp4_runtime.engine.core", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 20)
        frames = FrameBuffer()
        try:
            writer.write(frame(Start(config, logging.getLogger().getEffectiveLevel())))
            info, rest = await _wait_ready(reader, frames, on_progress)
        except BaseException as error:
            writer.close()
            process.kill()
            process.wait()
            if isinstance(error, ConnectionError):  # it ended with our first message unread
                raise EngineDeadError(_ENDED_LOADING) from error
            raise
        client = cls(process, writer, info)
        for payload in rest:
            await client._dispatch(payload)
        client._reader_task = asyncio.create_task(client._read(reader, frames))
        return client

    @property
    def alive(self) -> bool:
        return self._death is None

    @property
    def death_reason(self) -> str | None:
        return self._death

    @property
    def stalled_seconds(self) -> float:
        if not self._streams or not self.alive:
            return 0.0
        return max(0.0, time.monotonic() - self._last_progress - PATIENCE * self._announced_seconds)

    async def kill(self, reason: str) -> None:
        """End the engine process whatever state it is in; streams end with EngineDeadError(reason)."""
        self._die(reason)
        self._process.kill()
        await self.close(reason)

    async def close(self, reason: str = CLOSED) -> None:
        if self._closed_because is not None:
            return
        self._closed_because = reason
        if self.alive:
            self._send(Shutdown())
            self._flush()
        self._writer.close()  # after what is buffered; a closed socket ends the engine whatever state it is in
        try:
            await asyncio.to_thread(self._process.wait, _SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            logger.warning("the engine did not stop within %.0f s; killing it", _SHUTDOWN_SECONDS)
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        if self._reader_task is not None:
            await self._reader_task

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        cache_salt: str = "",
        priority: int = 0,
        pooling: Pooling | None = None,
        tenant: str = "",
        adapter: str = "",
    ) -> TokenStream:
        """Admit a request or raise at once: RequestError (400), QueueFullError (429), EngineDeadError (503)."""
        self._require_alive()
        check_request(prompt_token_ids, params, self.info, adapter)
        if request_id in self._streams:
            raise errors.InvalidParameterError(f"request id {request_id!r} is in use", "request_id")
        self.admission.admit(request_id, tenant, len(prompt_token_ids))
        if not self._streams:
            self._note_progress()
        now = time.monotonic()
        self._send(Submit(request_id, prompt_token_ids, params, now, cache_salt, priority, pooling, tenant, adapter))
        stream = self._streams[request_id] = TokenStream(request_id)
        return stream

    def abort(self, request_id: str) -> None:
        """End a request; its stream ends with finish_reason "abort" unless it finished first."""
        if request_id in self._streams and self.alive:
            self._send(Abort([request_id]))

    def on_step(self, callback: Callable[[StepStats], None]) -> None:
        """Call back after each step."""
        self._on_step.append(callback)

    def on_output(self, callback: Callable[[TokenOutput], None]) -> None:
        """Call back with every output as it arrives, whoever reads its stream and whenever."""
        self._on_output.append(callback)

    def on_finish(self, callback: Callable[[TokenOutput], None]) -> None:
        """Call back with each request's last output, which carries its times."""
        self._on_finish.append(callback)

    # -- wire ----------------------------------------------------------------------------------------------------

    def _send(self, message: ToEngine) -> None:
        """What is sent in one turn of the event loop leaves in one write, which wakes the engine once."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent += frame(message)

    def _flush(self) -> None:
        if self._unsent and not self._writer.is_closing():
            self._writer.write(bytes(self._unsent))
        self._unsent.clear()

    def _require_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)

    async def _read(self, reader: asyncio.StreamReader, frames: FrameBuffer) -> None:
        reason = "the engine process ended"
        try:
            while data := await reader.read(1 << 20):
                self._note_progress()
                for payload in frames.feed(data):
                    await self._dispatch(payload)
        except ConnectionError as error:
            # an engine that stops with our last messages unread resets the connection: expected while closing
            level = logging.DEBUG if self._closed_because is not None else logging.WARNING
            logger.log(level, "the connection to the engine broke: %s", error)
        except Exception:
            logger.exception("the engine's messages could not be handled")
            reason = "the engine's messages could not be handled"
        finally:  # whatever ended the reading: nobody may wait for tokens that will not come
            self._die(self._closed_because or reason)

    def _note_progress(self, announced_seconds: float = 0.0) -> None:
        self._last_progress, self._announced_seconds = time.monotonic(), announced_seconds

    async def _dispatch(self, payload: bytes) -> None:
        match decode_from_engine(payload):
            case Outputs(outputs, stats):
                self.stats = stats
                for i, output in enumerate(outputs):
                    if i and i % _DELIVERED_AT_ONCE == 0:
                        await asyncio.sleep(0)  # these streams write now; timers and new requests get their turn
                    self._deliver(output)
                for callback in self._on_step:
                    callback(stats)
            case Refused(request_id, kind, message, param):
                stream = self._streams.pop(request_id, None)
                self.admission.ended(request_id)
                if stream is not None:
                    stream.put(_error_of(kind, message, param))
            case Beat(expected_seconds):
                self._note_progress(expected_seconds)
            case Failed(kind, message):
                logger.error("the engine failed: %s: %s", kind, message)  # clients are told less
                self._die(f"the engine failed with {kind}")
            case Progress() | Ready():
                raise AssertionError("the engine reported start-up twice")

    def _deliver(self, output: TokenOutput) -> None:
        for callback in self._on_output:
            callback(output)
        stream = self._streams.get(output.request_id)
        self.admission.started(output.request_id)
        if output.finish_reason is not None:
            self._streams.pop(output.request_id, None)
            self.admission.ended(output.request_id)
            for callback in self._on_finish:
                callback(output)
        if stream is not None:
            stream.put(output)

    def _die(self, reason: str) -> None:
        if self._death is None:
            self._death = reason
            self.dead.set()
            if self._closed_because is None:
                logger.error("engine dead: %s", reason)
        for stream in self._streams.values():
            stream.put(EngineDeadError(self._death))
            self.admission.ended(stream.request_id)
        self._streams.clear()


async def _wait_ready(
    reader: asyncio.StreamReader, frames: FrameBuffer, on_progress: ProgressCallback | None
) -> tuple[EngineInfo, list[bytes]]:
    """Read until Ready; returns the info and any payloads that came behind it."""
    while data := await reader.read(1 << 20):
        payloads = frames.feed(data)
        for i, payload in enumerate(payloads):
            match decode_from_engine(payload):
                case Progress(phase, fraction):
                    if on_progress is not None:
                        on_progress(phase, fraction)
                case Ready(info):
                    return info, payloads[i + 1 :]
                case Failed(kind, message, flag):
                    raise _error_of(kind, message, flag)
                case other:
                    raise AssertionError(f"unexpected {type(other).__name__} before Ready")
    raise EngineDeadError(_ENDED_LOADING)


def _error_of(kind: str, message: str, detail: str | None) -> NVFP4Error:
    """The error the engine raised, as far as its class can be told from its name, without losing the message."""
    if kind == "ConfigError":
        return errors.ConfigError(message, detail)
    if kind == "QueueFullError":
        return QueueFullError(message)
    cls = getattr(errors, kind, None)
    if isinstance(cls, type) and issubclass(cls, errors.RequestError):
        return errors.InvalidParameterError(message, detail)
    if isinstance(cls, type) and issubclass(cls, errors.CheckpointError):
        return errors.CheckpointError(message)
    if isinstance(cls, type) and issubclass(cls, errors.KernelError):
        return errors.KernelError(message)
    return EngineDeadError(f"{kind}: {message}")
