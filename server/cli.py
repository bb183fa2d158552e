"""The `nvfp4` command: flags -> configs -> one call each. Heavy imports stay inside the sub-commands."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from nvfp4_runtime import __version__
from nvfp4_runtime.engine.logs import LOG_FORMATS, configure_logs
from nvfp4_runtime.errors import ConfigError, EngineDeadError, NVFP4Error, printable
from server.commands import distill, evaluate, flags, inspect, limits, parallel, quantize, reliability, security, top
from server.reasoning.parsers import REASONING_PARSERS
from server.tools.parsers import TOOL_PARSERS

EXIT_CONFIG, EXIT_LOAD, EXIT_ENGINE_DEATH = 1, 2, 3
EXIT_BROKEN_PIPE = 141  # what a shell says of a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done or drained, 1 configuration error, 2 load error or a file that fails, 3 engine death."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        parser, serve = _parser()
        if given[:1] == ["serve"]:
            given[1:1] = _flags_from_environment(serve, parser.parse_args(given))
        args = parser.parse_args(given)
        level = getattr(logging, str(getattr(args, "log_level", "warning")).upper())
        configure_logs(getattr(args, "log_format", "text"), level)
        run: Callable[[argparse.Namespace], int] = args.run
        code = run(args)
        sys.stdout.flush()  # whoever reads it may have gone: found out here, not while the interpreter ends
        return code
    except NVFP4Error as error:
        flag = getattr(error, "flag", None)
        # Error texts name the flag where that helps; repeat it only if this one does not.
        hint = f" [{flag}]" if flag and flag not in str(error) else ""
        print(f"nvfp4: {printable(str(error))}{hint}", file=sys.stderr)
        return exit_code(error)
    except BrokenPipeError:
        # The reader has seen enough, as `| head` has. What is still buffered goes nowhere, or it would be tried again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        logging.getLogger(__name__).debug("where it came from", exc_info=True)
        print(f"nvfp4: {printable(flags.describe(error))}", file=sys.stderr)
        return EXIT_LOAD
    except KeyboardInterrupt:
        return 130


def exit_code(error: NVFP4Error) -> int:
    if isinstance(error, ConfigError):
        return EXIT_CONFIG
    return EXIT_ENGINE_DEATH if isinstance(error, EngineDeadError) else EXIT_LOAD


class _Parser(argparse.ArgumentParser):
    """argparse would exit with 2, which means a load error here."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _parser() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    parser = _Parser(prog="nvfp4", description="Quantise models to NVFP4 and serve them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP, in OpenAI's and vLLM's dialect",
        epilog="Every flag can also be set by environment: NVFP4_MAX_NUM_SEQS=32, NVFP4_MODEL=/models/x.",
    )
    _serve_flags(serve)
    serve.set_defaults(run=_serve)

    quantize.add_parser(commands)
    inspect.add_parser(commands)
    distill.add_parser(commands)
    evaluate.add_parser(commands)
    top.add_parser(commands)

    prepare = commands.add_parser("prepare", help="make the default model in the cache, so that serve starts at once")
    prepare.set_defaults(run=_prepare, log_level="info")

    version = commands.add_parser("version", help="versions of nvfp4, torch and the kernels")
    version.set_defaults(run=_version)
    return parser, serve


def _serve_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        type=flags.path,
        metavar="MODEL",
        help="local model folder; left out: the default model, SmolLM2-135M",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=flags.whole, default=8000, help="0 takes any free port (default: %(default)s)")
    add("--served-model-name", action="append", metavar="NAME", help="name in requests and answers; may repeat")
    add("--numerics", choices=("auto", "w4a16", "w4a8", "w4a4"), default="auto", help="arithmetic of NVFP4 layers")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="type of activations")
    add(
        "--lm-head-dtype",
        choices=("auto", "bf16", "fp8", "nvfp4"),
        default="auto",
        help="quantise a plain head at load, for speed; auto keeps what is stored",
    )
    add(
        "--model-impl",
        choices=("auto", "native", "transformers"),
        default="auto",
        help="who implements the architecture: we, or the transformers library on our kernels; auto: we where we do",
    )
    add(
        "--lora-modules",
        nargs="+",
        action="extend",
        metavar="NAME=PATH",
        help="LoRA adapters (PEFT folders), chosen by a request's model; may repeat",
    )
    add("--max-lora-rank", type=flags.whole, default=64, help="adapters of a higher rank are refused (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if PyTorch can use one")
    add("--backend", default="auto", help="auto, cpu, triton or reference: asking for one runs there or fails")
    add("--no-cuda-graphs", action="store_true", help="on a GPU, launch every op of a decode step by itself")
    add(
        "--machine-limits",
        default="off",
        metavar="LIMITS",
        help="what steps are compared with in /metrics: off, measure (1 to 2 s, once per machine), or GB/s,GFLOP/s",
    )
    add("--threads", type=flags.whole, help="compute threads (default: the machine's cores)")
    add("--max-model-len", type=flags.whole, help="tokens of prompt and answer together (default: the model's)")
    add("--max-num-seqs", type=flags.whole, default=64, help="requests in one step (default: %(default)s)")
    add("--max-num-batched-tokens", type=flags.whole, default=1024, help="tokens in one step (default: %(default)s)")
    add(
        "--kv-cache-dtype",
        type=flags.kv_dtype,
        default="auto",
        metavar=f"{{{','.join(flags.KV_DTYPES)}}}",
        help="how keys and values are kept; auto: as the checkpoint declares, else bf16",
    )
    add(
        "--kv-cache-memory",
        type=flags.size,
        metavar="SIZE",
        help="for the KV cache, as 2GiB (default: by free memory)",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of a GPU's whole memory, for weights, steps and KV cache together (default: %(default)s)",
    )
    add("--num-kv-blocks", type=flags.whole, help="blocks of the KV cache, instead of a size")
    add("--no-prefix-caching", action="store_true", help="compute every prompt anew")
    add("--seed", type=flags.whole, default=0, help="of requests that give none (default: %(default)s)")
    add("--allow-download", action="store_true", help="MODEL may be a Hugging Face hub id")
    add("--generation-config", choices=("auto", "none"), default="auto", help="take the model's sampling defaults")
    add(
        "--tool-call-parser",
        default="auto",
        metavar="NAME",
        help="how the model writes tool calls: auto (by its chat template), none, or one of " + ", ".join(TOOL_PARSERS),
    )
    add(
        "--enable-auto-tool-choice",
        action="store_true",
        help="accepted for vLLM's sake: tools are parsed wherever a parser is known",
    )
    add(
        "--reasoning-parser",
        default="auto",
        metavar="NAME",
        help="how the model writes its reasoning: auto, none, or one of " + ", ".join(REASONING_PARSERS),
    )
    add("--enable-prompt-tokens-details", action="store_true", help="cached_tokens in usage")
    add("--trust-request-chat-template", action="store_true", help="requests may bring a chat_template of their own")
    add("--enable-tokenizer-info-endpoint", action="store_true", help="answer on /tokenizer_info")
    add("--embedding-pooling", choices=("last", "mean"), default="last", help="for /v1/embeddings (default: last)")
    add(
        "--response-store-memory",
        type=flags.size,
        default=64 << 20,
        metavar="SIZE",
        help="for what /v1/responses keeps (default: 64MiB)",
    )
    add("--response-store-ttl", type=float, default=3600.0, help="seconds it keeps a response (default: %(default)s)")
    limits.add_flags(parser)
    security.add_flags(parser)
    add("--no-ui", action="store_true", help="do not serve the page at /")
    reliability.add_flags(parser)
    parallel.add_flags(parser)
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    add("--log-format", choices=LOG_FORMATS, default="text", help="json: one object a line (default: %(default)s)")
    add("--no-log-requests", action="store_true", help="no line in the log for each request")
    add("--log-prompts", action="store_true", help="the beginning of each prompt in its request's line")
    add(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send traces there, OTLP over HTTP; needs the extra otel (default: as OTEL_EXPORTER_OTLP_ENDPOINT says)",
    )
    add("--simulate", action="store_true", help="no model: deterministic tokens, one per byte, for tests of clients")
    add("--simulate-step-seconds", type=float, help="how long each simulated step takes (default: no time)")
    add("--simulate-script", metavar="TEXT", help="what the simulated model says, over and over")


def _flags_from_environment(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[str]:
    """Environment variables as flags before those of the command line (`given`), which therefore win."""
    from server.config import environment_flags, warn_of_unknown

    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "run")}
    warn_of_unknown(actions)
    found: list[str] = []
    for name, value in environment_flags(actions).items():
        action = actions[name]
        if not action.option_strings:
            continue  # MODEL: read in _serve, so that one on the command line wins
        if isinstance(getattr(given, name), list):
            continue  # may repeat: what the command line gives replaces the environment's, it does not join it
        if action.nargs == 0:
            if value.lower() not in ("0", "1", "false", "true"):
                raise ConfigError(f"NVFP4_{name.upper()} must be 0 or 1, found {value!r}", action.option_strings[0])
            found += [action.option_strings[0]] if value.lower() in ("1", "true") else []
        else:
            found += [f"{action.option_strings[0]}={value}"]
    return found


def _serve(args: argparse.Namespace) -> int:
    from nvfp4_runtime.process import allow_all_files
    from server.config import launcher_variables
    from server.serve import serve

    allow_all_files()
    place = parallel.parallel_config(args, launcher_variables())
    return serve(args) if place.rank == 0 else parallel.follow(args, place)


def _prepare(args: argparse.Namespace) -> int:
    from nvfp4_runtime.quantize.default_model import ensure_default_model

    print(ensure_default_model(progress=True))
    return 0


def _version(args: argparse.Namespace) -> int:
    import platform

    print(f"nvfp4 {__version__}")
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch {_torch_version()}")
    print(f"backend cpu: {_native_kernels()}")
    print("backend reference: plain PyTorch, runs everywhere")
    return 0


def _torch_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "not installed"


def _native_kernels() -> str:
    """The compiled extension's ISA variants and threads. Imports the extension alone, not torch."""
    from importlib import import_module

    from nvfp4_runtime.kernels.cpu.cores import physical_cores

    try:
        native = import_module("nvfp4_runtime.kernels.cpu._native")
    except ImportError:
        return "extension not built (install a C++17 compiler and run `pip install .` again)"
    isas = list(native.supported_isas())
    threads = physical_cores()
    on = f"{threads} thread{'s' * (threads > 1)} unless --threads is given"
    return f"built, runs {isas[0]} (of {', '.join(isas)}) on {on}"


if __name__ == "__main__":
    sys.exit(main())
