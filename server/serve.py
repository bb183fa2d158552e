"""`nvfp4 serve`: start the engine process and, while it loads, everything else; then serve until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gc
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nvfp4_runtime.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    ParallelConfig,
    SchedulerConfig,
    SimulatedConfig,
)
from nvfp4_runtime.engine.client import ProgressCallback
from nvfp4_runtime.engine.messages import EngineInfo
from nvfp4_runtime.engine.replicas import Replicas
from nvfp4_runtime.engine.supervisor import SupervisedEngine, Supervision
from nvfp4_runtime.errors import ConfigError, EngineDeadError, InvalidParameterError, NVFP4Error
from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.text.processor import TextProcessor
from nvfp4_runtime.text.tokenizer import read_json
from server.commands import limits, security
from server.commands.parallel import kv_events, parallel_config
from server.commands.reliability import simulated_faults, supervision
from server.config import ServerConfig, environment_flags, launcher_variables, traces_wanted
from server.loading import LoadingGate
from server.reasoning.parsers import reasoning_style
from server.replica_metrics import ReplicaMetrics
from server.screen import LoggedProgress, ProgressLine, log_ready, print_ready
from server.shutdown import LAST_EVENTS_SECONDS, Shutdown
from server.tools.parsers import tool_style
from server.tracing import Tracer, otlp_exporter

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

logger = logging.getLogger(__name__)
T = TypeVar("T")

KEEP_ALIVE_SECONDS = 75
BACKLOG = 2048  # uvicorn's
COLLECT_AFTER_OBJECTS = 20_000  # Python's 700 are fewer than one step of a few hundred streams makes
# generation_config.json's name -> ours, and its type
_SAMPLING_DEFAULTS: dict[str, tuple[str, type[int] | type[float]]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "max_new_tokens": ("max_tokens", int),
}


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


def server_config(args: argparse.Namespace, model: str | None) -> ServerConfig:
    names = args.served_model_name or ["simulated"]
    if not all(name.strip() for name in names):
        raise ConfigError("an empty name is no request's; give one, or leave the flag out", "--served-model-name")
    if not args.simulate:
        for flag, given in (("step-seconds", args.simulate_step_seconds), ("script", args.simulate_script)):
            if given is not None:
                raise ConfigError(f"--simulate-{flag} says how to simulate; it needs --simulate", f"--simulate-{flag}")
    elif not 0 <= (args.simulate_step_seconds or 0.0) < math.inf:
        raise ConfigError(f"expected seconds, 0 or more, found {args.simulate_step_seconds}", "--simulate-step-seconds")
    tool_style(args.tool_call_parser, None, True)  # a name that is not known ends the start here, not after loading
    reasoning_style(args.reasoning_parser, None)
    secured = security.config_fields(args)
    if not secured["api_key_hashes"] and not security.is_loopback(args.host):
        logger.warning("listening on %s without --api-key-file: everybody who reaches it may use it", args.host)
    if not 0 < args.response_store_ttl < math.inf:
        raise ConfigError(f"expected seconds, more than 0, found {args.response_store_ttl}", "--response-store-ttl")
    return ServerConfig(
        served_model_names=tuple(names),
        model_root=model or "",
        shutdown_timeout_seconds=args.shutdown_timeout,
        drain_delay_seconds=args.drain_delay,
        stall_seconds=args.stall_timeout,
        enable_prompt_tokens_details=args.enable_prompt_tokens_details,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
        trust_request_chat_template=args.trust_request_chat_template,
        enable_tokenizer_info=args.enable_tokenizer_info_endpoint,
        pooling=args.embedding_pooling,
        stored_responses_bytes=args.response_store_memory,
        stored_responses_seconds=args.response_store_ttl,
        **secured,
        **limits.config_fields(args),
        log_requests=not args.no_log_requests,
        log_prompts=args.log_prompts,
        ui=not args.no_ui,
    )


def whole_engine_config(
    args: argparse.Namespace, model: str, place: ParallelConfig, config: ServerConfig
) -> EngineConfig:
    """Of a server, with what one rank's alone lacks. ConfigError for an adapter that has the model's name."""
    engine = replace(engine_config(args, model), parallel=place, kv_events=kv_events(args.kv_events_config))
    for adapter in engine.adapters:
        if adapter.name in config.served_model_names:
            raise _no_adapter(adapter.name, "the model has that name; choose another, or another --served-model-name")
    return engine


def engine_config(args: argparse.Namespace, model: str) -> EngineConfig:
    simulated = None
    if args.simulate:
        tokenizer = TextProcessor.simulated().tokenizer
        simulated = SimulatedConfig(
            vocab_size=tokenizer.vocab_size,
            max_model_len=SimulatedConfig.max_model_len if args.max_model_len is None else args.max_model_len,
            script=tuple(tokenizer.encode_plain(args.simulate_script or "")),
            eos_token_id=tokenizer.eos_token_ids[0],
            step_seconds=args.simulate_step_seconds or 0.0,
            faults=simulated_faults(args.simulate_fault, tokenizer.encode_plain),
        )
    return EngineConfig(
        model=model,
        dtype=args.dtype,
        numerics=args.numerics,
        lm_head_dtype=args.lm_head_dtype,
        model_impl=args.model_impl,
        adapters=adapter_flags(args.lora_modules or []),
        max_lora_rank=args.max_lora_rank,
        device=args.device,
        backend=args.backend,
        cuda_graphs=not args.no_cuda_graphs,
        self_test=not args.no_self_test,
        machine_limits=args.machine_limits,
        log_format=args.log_format,
        threads=args.threads,
        seed=args.seed,
        cache=CacheConfig(
            num_blocks=args.num_kv_blocks,
            memory_bytes=args.kv_cache_memory,
            kv_dtype=args.kv_cache_dtype,
            enable_prefix_caching=not args.no_prefix_caching,
            gpu_memory_utilization=args.gpu_memory_utilization,
        ),
        scheduler=SchedulerConfig(
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_model_len=args.max_model_len,
            max_queued_requests=args.max_queued_requests,
            max_queued_tokens=args.max_queued_tokens,
        ),
        simulated=simulated,
    )


def adapter_flags(values: Sequence[str]) -> tuple[AdapterConfig, ...]:
    """`name=path`, or vLLM's JSON object with name and path, as often as given. ConfigError for what is neither."""
    found: list[AdapterConfig] = []
    for value in values:
        name, _, path = value.partition("=")
        if value.lstrip().startswith("{"):
            try:
                given = json.loads(value)
            except ValueError as error:
                raise _no_adapter(value, f"it is no JSON: {error}") from error
            unknown = given.keys() - {"name", "path", "base_model_name"}
            if unknown:
                raise _no_adapter(value, f"unknown {', '.join(sorted(unknown))}")
            name, path = given.get("name", ""), given.get("path", "")
        if not all(isinstance(part, str) and part.strip() for part in (name, path)):
            raise _no_adapter(value, "expected name=path")
        if any(name == other.name for other in found):
            raise _no_adapter(value, f"the name {name!r} is given twice")
        found.append(AdapterConfig(name, os.path.expanduser(path)))
    return tuple(found)


def _no_adapter(value: str, why: str) -> ConfigError:
    return ConfigError(f"{value[:200]!r} names no LoRA adapter: {why}", "--lora-modules")


def model_argument(args: argparse.Namespace) -> str | None:
    """MODEL as it was given, on the command line or in the environment."""
    model = args.model or environment_flags(["model"]).get("model")
    return None if model is None else os.path.expanduser(model)


def model_folder(args: argparse.Namespace) -> Path:
    """The local folder to load; see `resolve_model`."""
    return resolve_model(model_argument(args), args.allow_download)


def resolve_model(model: str | None, allow_download: bool) -> Path:
    """The local folder to load. Raises ConfigError when there is none and none may be fetched."""
    if model is None:
        return default_model()
    if Path(model).is_dir():
        return Path(model)
    if not allow_download:
        raise ConfigError(
            f"there is no model folder {model}; give a local folder, or --allow-download to fetch a hub id",
            "--allow-download",
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            f"fetching {model} needs the package huggingface_hub: pip install huggingface_hub", "--allow-download"
        ) from error
    patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ConfigError(f"{model} could not be fetched: {error}", "--allow-download") from error


def default_model() -> Path:
    """The default model's folder in the cache, made there on first use by a process of its own (it needs torch)."""
    from nvfp4_runtime.quantize.default_model import cached_default_model

    folder = cached_default_model()
    if folder is None:
        # -P: modules of the working directory must not take the place of ours
        command = [sys.executable, "-P", "-m", "server.cli", "prepare"]
        code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
        if code != 0:
            raise SystemExit(code)  # it has said why
        folder = cached_default_model()
        assert folder is not None, "prepare ended well and made nothing"
    return folder


def sampling_defaults(folder: Path, args: argparse.Namespace) -> dict[str, float | int]:
    """The checkpoint's own defaults, as vLLM takes them from generation_config.json.

    Raises ConfigError for a value that no request could be served with.
    """
    if args.generation_config == "none":
        return {}
    declared = read_json(folder / "generation_config.json")
    found = {
        ours: _sampling_default(theirs, declared[theirs], kind)
        for theirs, (ours, kind) in _SAMPLING_DEFAULTS.items()
        if declared.get(theirs) is not None
    }
    try:
        SamplingParams(**found).validate()  # type: ignore[arg-type]  # each is of its field's type: made so above
    except InvalidParameterError as error:
        theirs = next(theirs for theirs, (ours, _) in _SAMPLING_DEFAULTS.items() if ours == error.param)
        raise _unusable_default(theirs, str(error)) from error
    return found


def _sampling_default(name: str, value: object, kind: type[int] | type[float]) -> float | int:
    whole = kind is float or (isinstance(value, int | float) and value == value // 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not whole or abs(value) >= 2**63:
        expected = "a number" if kind is float else "a whole number"
        raise _unusable_default(name, f"expected {expected}, found {value!r:.64}")
    return kind(value)


def _unusable_default(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"generation_config.json: {name}: {why}; correct the file, or start with --generation-config none",
        "--generation-config",
    )


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
    server = _make_server(app, config)
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


def _make_server(app: FastAPI, config: ServerConfig) -> uvicorn.Server:
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
            http=BoundedProtocol.within(config),
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
