"""The application that `nvfp4 serve FLAGS` serves, for a host that owns the HTTP port, such as Ray Serve.

The engines are as supervised as ever; `--tensor-parallel-size` and `--data-parallel-size` start their processes on this
machine, so the host must own as many GPUs or CPUs. What belongs to the port does not come along: bounds on headers and
on the time that a request takes to arrive, slow readers, the drain at SIGTERM. These are the host's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastapi import FastAPI

from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.text.processor import TextProcessor
from server.cli import _parser
from server.commands.parallel import parallel_config
from server.commands.reliability import supervision
from server.configs import server_config, whole_engine_config
from server.health import why_not_healthy
from server.model_source import resolve_model, sampling_defaults
from server.serve import application, launch_engines

# Flags that say something to a port or process which is not ours here.
HOSTS_OWN = (
    "host",
    "port",
    "metrics_port",
    "exit_on_engine_death",
    "drain_delay",
    "shutdown_timeout",
    "otlp_traces_endpoint",
)


async def embedded_app(flags: Sequence[str]) -> FastAPI:
    """An application whose engines are loaded; it closes them when its lifespan ends. Reads no environment: ranks that
    others started (torchrun, LeaderWorkerSet) are not looked for, all are started here.

    Raises NVFP4Error when it cannot start, and ConfigError for a flag that has no meaning here.
    """
    parser, serve = _parser()
    args = parser.parse_args(["serve", *flags])
    for name in HOSTS_OWN:
        if getattr(args, name) != serve.get_default(name):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} belongs to who owns the port, which is not this process; leave it out", flag)
    place = parallel_config(args, {})
    config = server_config(args, args.model)
    model = ""
    if not args.simulate:
        folder = resolve_model(args.model, args.allow_download)
        model = str(folder)
        names = tuple(args.served_model_name or (folder.name, *{model} - {folder.name}))
        defaults = sampling_defaults(Path(model), args)
        config = replace(config, model_root=model, default_sampling=defaults, served_model_names=names)
    text = TextProcessor.simulated() if args.simulate else await asyncio.to_thread(TextProcessor.load, model)
    engine = await launch_engines(whole_engine_config(args, model, place, config), supervision(args))
    return application(engine, text, config)


def why_unhealthy(app: FastAPI) -> str | None:
    """As /health says it; None while all is well."""
    return why_not_healthy(app.state.server)
