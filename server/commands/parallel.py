"""`nvfp4 serve`: the flags about several processes, and who starts them.

Data parallelism: several engines on this host, each with its ranks. Tensor parallelism on one host needs the flag
alone: the engine starts its other ranks. Across hosts every rank is started by torchrun, or as a pod of a
LeaderWorkerSet; rank 0 serves, the others follow it.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import fields, replace

from nvfp4_runtime.config import KVEventsConfig, ParallelConfig
from nvfp4_runtime.errors import ConfigError
from server.commands import flags

logger = logging.getLogger(__name__)

TENSOR = "--tensor-parallel-size"
DATA = "--data-parallel-size"
EVENTS = "--kv-events-config"
DEFAULT_PORT = 29500  # torchrun's


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        TENSOR,
        "-tp",
        type=flags.whole,
        default=1,
        metavar="N",
        help="processes that share every layer of one engine; across hosts one per RANK of torchrun or LeaderWorkerSet "
        "(default: %(default)s)",
    )
    parser.add_argument(
        DATA,
        "-dp",
        type=flags.whole,
        default=1,
        metavar="N",
        help="engines, each with a whole model and a KV cache, behind this server; a request goes where the least has "
        "to be computed for it (default: %(default)s)",
    )
    parser.add_argument(
        EVENTS,
        metavar="JSON",
        help='tell routers over ZeroMQ what the prefix cache holds, as vLLM does: {"endpoint": "tcp://host:5557"}; '
        "who can connect there can read the prompts",
    )


def parallel_config(args: argparse.Namespace, environment: Mapping[str, str]) -> ParallelConfig:
    """This process among the ranks. `environment`: see server.config.launcher_variables.

    Raises ConfigError when the flag contradicts whoever started us.
    """
    size = args.tensor_parallel_size
    replicas = args.data_parallel_size
    for flag, value in ((TENSOR, size), (DATA, replicas)):
        if value < 1:
            raise ConfigError(f"expected 1 or more, found {value}", flag)
    if size == 1:
        return ParallelConfig(replicas=replicas)
    if args.simulate:
        raise ConfigError(f"{TENSOR} splits a model, and --simulate has none; leave one of them out", TENSOR)
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun listens there, and keeps listening
    if "LWS_LEADER_ADDRESS" in environment:
        found = ParallelConfig(
            _number(environment, "LWS_GROUP_SIZE"),
            _number(environment, "LWS_WORKER_INDEX"),
            environment["LWS_LEADER_ADDRESS"],
            _number(environment, "MASTER_PORT", DEFAULT_PORT),
            local_rank=_number(environment, "LOCAL_RANK", 0),
        )
    elif "WORLD_SIZE" in environment:
        found = ParallelConfig(
            _number(environment, "WORLD_SIZE"),
            _number(environment, "RANK"),
            environment.get("MASTER_ADDR", ""),
            _number(environment, "MASTER_PORT", DEFAULT_PORT),
            environment.get("TORCHELASTIC_RESTART_COUNT", "0") if agent else None,
            _number(environment, "LOCAL_RANK", 0),
        )
    else:
        return ParallelConfig(size, replicas=replicas)
    if replicas > 1:
        raise ConfigError(f"{DATA} {replicas}: ranks that others start are of one engine; run one server each", DATA)
    if found.size != size:
        raise ConfigError(
            f"{TENSOR} is {size}, and the environment says that {found.size} processes were started: a rank is one "
            "process (a pod, with LeaderWorkerSet); make the two agree, or unset WORLD_SIZE to have ranks started here",
            TENSOR,
        )
    if not found.address:
        raise ConfigError("WORLD_SIZE is set and MASTER_ADDR is not: the ranks do not know where to meet", TENSOR)
    if not 0 <= found.rank < size:
        raise ConfigError(f"RANK is {found.rank}; expected 0 to {size - 1}", TENSOR)
    return found


def kv_events(text: str | None) -> KVEventsConfig | None:
    """vLLM's object, with its defaults but for the address, which only this host reaches.

    Raises ConfigError for what is not known.
    """
    if text is None:
        return None
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{EVENTS} is no JSON: {error}", EVENTS) from error
    if not isinstance(given, dict):
        raise ConfigError(f"{EVENTS}: expected a JSON object, found {text!r:.80}", EVENTS)
    enabled, publisher = given.pop("enable_kv_cache_events", True), given.pop("publisher", "zmq")
    if not isinstance(enabled, bool):
        raise ConfigError(f"{EVENTS}: enable_kv_cache_events is {enabled!r:.40}; expected true or false", EVENTS)
    if not enabled or publisher == "null":
        return None
    if publisher != "zmq":
        raise ConfigError(f"{EVENTS}: publisher {publisher!r:.40} is not known; expected zmq", EVENTS)
    counts = {field.name: isinstance(field.default, int) for field in fields(KVEventsConfig)}
    for name, value in given.items():
        if name not in counts:
            raise ConfigError(f"{EVENTS}: {name!r} is not known; expected {', '.join(counts)}", EVENTS)
        sound = type(value) is int and value >= 1 if counts[name] else isinstance(value, str)
        if not sound:
            expected = "1 or more" if counts[name] else "text"
            raise ConfigError(f"{EVENTS}: {name} is {value!r:.80}; expected {expected}", EVENTS)
    return KVEventsConfig(**given)


def follow(args: argparse.Namespace, parallel: ParallelConfig) -> int:
    """A rank that others started and that is not the first: it serves nothing, and ends with rank 0."""
    from nvfp4_runtime.engine.rank import run
    from nvfp4_runtime.process import leave
    from server.configs import engine_config
    from server.model_source import model_folder

    config = replace(engine_config(args, str(model_folder(args))), parallel=parallel)
    logger.info("rank %d of %d: follows %s:%d", parallel.rank, parallel.size, parallel.address, parallel.port)
    leave(run(config, None, logging.getLogger().getEffectiveLevel()))


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(f"expected a number in the environment variable {name}, found {text!r:.40}", TENSOR)
    return int(text)
