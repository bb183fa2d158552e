"""`nvfp4 serve`: the flags about faults, restarts and shutting down, and what is made of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import get_args

from nvfp4_runtime.config import FaultKind, SimulatedFault
from nvfp4_runtime.engine.supervisor import Supervision
from nvfp4_runtime.errors import ConfigError
from server.commands import flags

FAULT = "--simulate-fault"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--max-engine-restarts",
        type=flags.whole,
        default=Supervision.max_restarts,
        metavar="N",
        help="times an engine that died or hangs is replaced within ten minutes, before the server exits with 3 "
        "(default: %(default)s)",
    )
    add("--exit-on-engine-death", action="store_true", help="exit with 3 at once instead: whoever runs us restarts us")
    add(
        "--stall-timeout",
        type=float,
        default=Supervision.stall_seconds,
        metavar="SECONDS",
        help="work waits and no step ends for so long: the engine hangs (default: %(default)s)",
    )
    add(
        "--engine-start-timeout",
        type=float,
        default=Supervision.load_seconds,
        metavar="SECONDS",
        help="a start of the engine that takes longer has failed (default: %(default)s)",
    )
    add("--no-self-test", action="store_true", help="be ready without comparing kernels with the reference")
    add("--shutdown-timeout", type=float, default=30.0, help="seconds running requests get after SIGTERM")
    add(
        "--drain-delay",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="after SIGTERM, not ready any more but still accepting, until load balancers know; Ctrl-C skips it "
        "(default: %(default)s)",
    )
    add(
        FAULT,
        action="append",
        default=[],
        metavar="KIND@WHEN",
        help=f"with --simulate: {', '.join(get_args(FaultKind))}, at step=N or where a prompt holds prompt=TEXT",
    )


def supervision(args: argparse.Namespace) -> Supervision:
    """ConfigError for a duration that makes no sense, or for faults without --simulate."""
    for flag, least in (
        ("stall_timeout", 0.0),
        ("engine_start_timeout", 0.0),
        ("shutdown_timeout", None),
        ("drain_delay", None),
    ):
        value = getattr(args, flag)
        enough = value >= 0 if least is None else value > least
        if not enough or not value < math.inf:
            expected = "0 or more" if least is None else "more than 0"
            name = "--" + flag.replace("_", "-")
            raise ConfigError(f"expected seconds, {expected}, found {value}", name)
    if args.simulate_fault and not args.simulate:
        raise ConfigError(f"{FAULT} breaks simulated engines only: it needs --simulate", FAULT)
    if args.max_engine_restarts < 0:
        raise ConfigError(f"expected 0 or more, found {args.max_engine_restarts}", "--max-engine-restarts")
    return Supervision(
        stall_seconds=args.stall_timeout,
        load_seconds=args.engine_start_timeout,
        max_restarts=0 if args.exit_on_engine_death else args.max_engine_restarts,
    )


def simulated_faults(given: list[str], encode: Callable[[str], list[int]]) -> tuple[SimulatedFault, ...]:
    """KIND@step=N or KIND@prompt=TEXT, each."""
    return tuple(_fault(text, encode) for text in given)


def _fault(text: str, encode: Callable[[str], list[int]]) -> SimulatedFault:
    name, _, when = text.partition("@")
    condition, _, value = when.partition("=")
    kind: FaultKind | None = next((known for known in get_args(FaultKind) if known == name), None)
    if kind is not None and condition == "prompt" and value:
        return SimulatedFault(kind, prompt=tuple(encode(value)))
    if kind is not None and condition == "step" and value.isdecimal() and int(value) > 0:
        return SimulatedFault(kind, step=int(value))
    kinds = ", ".join(get_args(FaultKind))
    raise ConfigError(f"expected KIND@step=N or KIND@prompt=TEXT with KIND one of {kinds}; found {text!r:.64}", FAULT)
