"""`nvfp4 serve`: start the engine process and, while it loads, everything else; then serve until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gc
import logging
import math
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nvfp4_runtime.config import EngineConfig
from nvfp4_runtime.engine.client import ProgressCallback
from nvfp4_runtime.engine.messages import EngineInfo
from nvfp4_runtime.engine.replicas import Replicas
from nvfp4_runtime.engine.supervisor import SupervisedEngine, Supervision
from nvfp4_runtime.errors import ConfigError, EngineDeadError, NVFP4Error
from nvfp4_runtime.text.processor import TextProcessor
from server.commands.parallel import parallel_config
from server.commands.reliability import supervision
from server.config import ServerConfig, launcher_variables, traces_wanted
from server.configs import server_config, whole_engine_config
from server.loading import LoadingGate
from server.model_source import model_argument, model_folder, sampling_defaults
from server.replica_metrics import ReplicaMetrics
from server.request_record import Observer
from server.screen import LoggedProgress, ProgressLine, log_ready, print_ready
from server.shutdown import LAST_EVENTS_SECONDS, Shutdown
from server.tracing import Tracer, otlp_exporter

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

logger = logging.getLogger(__name__)
T = TypeVar("T")

KEEP_ALIVE_SECONDS = 75
BACKLOG = 2048  # uvicorn's
COLLECT_AFTER_OBJECTS = 20_000  # Python's 700 are fewer than one step of a few hundred streams makes


def serve(args: argparse.Namespace) -> int:
    """Run the server; returns the process's exit code. Raises NVFP4Error when it cannot start."""
    started = time.monotonic()
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # we say ourselves when we start and stop
    model = model_argument(args)
    policy = supervision(args)
    place = parallel_config(args, launcher_variables())
    if place.address and policy.max_restarts:
        logger.info("other ranks were started by others, who start all of them anew: an engine's death is our end")
        policy = replace(policy, max_restarts=0)
    config = server_config(args, model)
    exporter = None
    if args.otlp_traces_endpoint is not None or traces_wanted():
        exporter = otlp_exporter(args.otlp_traces_endpoint)
    socks = [bind(args.host, args.port)]  # before loading: a port in use should not cost a minute
    if args.metrics_port is not None:
        socks.append(bind(args.host, args.metrics_port, "--metrics-port"))
        config = replace(config, metrics_port=socks[1].getsockname()[1])
    if not args.simulate:
        model = str(model_folder(args))
        config = replace(config, model_root=model, default_sampling=sampling_defaults(Path(model), args))
        if args.served_model_name is None:
            config = replace(config, served_model_names=(Path(model).name, *{model} - {Path(model).name}))
    engine = whole_engine_config(args, model or "", place, config)
    tracer = None if exporter is None else Tracer(exporter)
    try:
        return _run(_serve(args, engine, policy, config, socks, started, tracer))
    finally:
        if tracer is not None:
            tracer.close()
        gc.freeze()  # the interpreter's last collection would walk all of it, a quarter of a second for nothing


def bind(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A socket that listens already, which makes the port ours; LoadingGate takes who comes early.

    Being bound alone would not do: two processes may bind one port with SO_REUSEADDR, and the second to listen fails.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"the port must be between 0 and 65535, found {port}", flag)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except UnicodeError as error:
        raise ConfigError(f"the host {host!r} is no name or address: {error}", "--host") from error
    except OSError as error:
        hint = f"; choose another with {flag}" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}{hint}", flag) from error
    return sock


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _run(main: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def _serve(
    args: argparse.Namespace,
    engine_config: EngineConfig,
    policy: Supervision,
    config: ServerConfig,
    socks: list[socket.socket],
    started: float,
    tracer: Tracer | None,
) -> int:
    stop = _StopSignal()
    gate = LoadingGate(socks)
    progress = ProgressLine() if args.log_format == "text" else LoggedProgress()
    launch = asyncio.create_task(launch_engines(engine_config, policy, progress))
    try:
        # While the engine's process loads, this one imports the web stack and reads the tokenizer.
        beside = asyncio.gather(
            asyncio.to_thread(_timed, _import_web), asyncio.to_thread(_timed, lambda: _load_text(engine_config))
        )
        await stop.race(asyncio.gather(beside, launch))
    except EngineDeadError as error:
        raise NVFP4Error(str(error)) from error  # it never lived: a failure to load
    finally:
        progress.done()
        if not launch.done():
            launch.cancel()
            await asyncio.gather(launch, return_exceptions=True)
        if stop.received is not None or launch.cancelled() or launch.exception() is not None:
            gate.close()
    if stop.received is not None:
        if not launch.cancelled() and launch.exception() is None:
            await launch.result().close()
        return 0
    engine = launch.result()
    (_, web_seconds), (text, tokenizer_seconds) = beside.result()
    engine.info.startup_seconds |= {"web": web_seconds, "tokenizer": tokenizer_seconds}  # beside the engine's phases
    engine.info.startup_seconds["ready"] = time.monotonic() - started
    try:
        announce = print_ready if args.log_format == "text" else log_ready
        return await _run_http(engine, text, config, socks, gate, stop, tracer, announce)
    finally:
        await engine.close()


async def launch_engines(
    config: EngineConfig, policy: Supervision, progress: ProgressCallback | None = None
) -> SupervisedEngine | Replicas:
    """As many as `config.parallel.replicas`, each with its ranks."""
    if config.parallel.replicas > 1:
        return await Replicas.launch(config, policy, progress)
    return await SupervisedEngine.launch(config, policy, progress)


def application(
    engine: SupervisedEngine | Replicas, text: TextProcessor, config: ServerConfig, tracer: Tracer | None = None
) -> FastAPI:
    """`create_app`, with the metrics of several engines where there are several."""
    from server.app import create_app

    app = create_app(engine, text, config, tracer)
    if isinstance(engine, Replicas):
        ReplicaMetrics(app.state.server.metrics.registry, config.served_model_names[0], engine)
    return app


async def _run_http(
    engine: SupervisedEngine | Replicas,
    text: TextProcessor,
    config: ServerConfig,
    socks: list[socket.socket],
    gate: LoadingGate,
    stop: _StopSignal,
    tracer: Tracer | None,
    announce: Callable[[EngineInfo, ServerConfig, str], None],
) -> int:
    app = application(engine, text, config, tracer)
    server = _make_server(app, config, app.state.observers)
    gate.stop()
    serving = asyncio.create_task(server.serve(sockets=socks))
    while not server.started and not serving.done():
        await asyncio.sleep(0.005)
    if server.started:
        await gate.hand_over(server)
        _spare_the_collector()
        announce(engine.info, config, url_of(socks[0]))
    shutdown = Shutdown(server, app.state.server)
    # Ctrl-C is a person's, whom no load balancer follows
    stop.then(lambda number: shutdown.begin(0.0 if number == signal.SIGINT else config.drain_delay_seconds))
    ends: set[asyncio.Future[Any]] = {serving, engine.given_up}
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done() and not app.state.server.draining:
        server.config.timeout_graceful_shutdown = LAST_EVENTS_SECONDS
        server.should_exit = True
        await serving
        raise EngineDeadError(f"the engine died: {engine.given_up.result()}")
    await serving
    if server.force_exit:  # told twice: what the engine is at is not waited for, and uvicorn has left out the lifespan
        await engine.kill()
        await server.lifespan.shutdown()
    return 0


def _spare_the_collector() -> None:
    """Keep the garbage collector's walks short and rare: each stops every stream.

    What is loaded by now (routes, validators, the tokenizer) stays, and is not walked again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER_OBJECTS)


def _make_server(app: FastAPI, config: ServerConfig, observers: Sequence[Observer] = ()) -> uvicorn.Server:
    import uvicorn

    from server.http_protocol import BoundedProtocol

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:  # ours are set already; uvicorn's would end us with the signal
            yield

    return Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            http=BoundedProtocol.within(config, observers),
            ws="none",
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(config.shutdown_timeout_seconds),
        )
    )


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` gives, and the seconds it took."""
    started = time.monotonic()
    return work(), time.monotonic() - started


def _import_web() -> None:
    import uvicorn  # noqa: F401 - for its side effect: later imports are instant

    import server.app
    import server.http_protocol  # noqa: F401


def _load_text(config: EngineConfig) -> TextProcessor:
    return TextProcessor.simulated() if config.simulated is not None else TextProcessor.load(config.model)


class _StopSignal:
    """SIGTERM and SIGINT, from the first moment on. `received`: the last one; `then` says what to do about each."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._event = asyncio.Event()
        self._action: Any = None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        self.received = number
        self._event.set()
        if self._action is not None:
            self._action(number)

    def then(self, action: Any) -> None:
        self._action = action
        if self.received is not None:
            action(self.received)

    async def race(self, work: asyncio.Future[Any]) -> None:
        """Wait for `work` or a signal; raises what `work` raises."""
        signalled = asyncio.create_task(self._event.wait())
        try:
            await asyncio.wait({work, signalled}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
        finally:
            signalled.cancel()
