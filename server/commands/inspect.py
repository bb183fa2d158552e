"""`nvfp4 inspect PATH`: the checkpoint doctor. Exit code 0 sound, 1 warnings or errors, 2 unreadable, or unwritable."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nvfp4_runtime.errors import CheckpointError, ConfigError, NVFP4Error, printable
from server.commands import flags

EXIT_FINDINGS = 1


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "inspect",
        help="say what is in a checkpoint and whether it is sound",
        description="Say what is stored in a checkpoint, layer by layer, and whether it is sound.",
        epilog="Exit code: 0 sound, 1 warnings or errors were found, 2 unreadable.",
    )
    parser.add_argument(
        "path",
        type=flags.path,
        metavar="PATH",
        help="model folder, or `default` (SmolLM2-135M in NVFP4), or `default-bf16` (its parent)",
    )
    parser.add_argument("--json", action="store_true", help="for programs: every layer, every finding")
    parser.add_argument(
        "--layers", action="store_true", help="a line for every layer, not one for those that are alike"
    )
    parser.add_argument(
        "--parent",
        type=flags.path,
        metavar="DIR",
        help="the plain model it was made of: measure the distance (`default-bf16` works too)",
    )
    parser.add_argument("--repair", type=flags.path, metavar="OUT", help="write a sound copy into this new folder")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        action="append",
        type=flags.size,
        help="say what fits into so much memory, as 24GiB; may repeat (default: sizes of common cards)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except NVFP4Error as error:
        error.args = (printable(str(error)),)  # names out of files and of the command line
        raise
    except OSError as error:
        about = f"{error.filename}: " if error.filename is not None else ""
        raise CheckpointError(printable(f"cannot go on: {about}{error.strerror or error}")) from error


def _run(args: argparse.Namespace) -> int:
    from nvfp4_runtime.checkpoint.doctor.describe import MEMORIES
    from nvfp4_runtime.checkpoint.doctor.inspect import inspect
    from nvfp4_runtime.checkpoint.doctor.render import render
    from nvfp4_runtime.checkpoint.doctor.repair import inspect_and_repair
    from nvfp4_runtime.models.expected import expected

    memories = tuple(args.memory or MEMORIES)
    path = _folder(args.path, "PATH")
    parent = None if args.parent is None else _folder(args.parent, "--parent")
    with _bars(show=sys.stderr.isatty() and not args.json) as progress:
        if args.repair is not None:
            out = _named(args.repair, "--repair")
            report = inspect_and_repair(path, out, parent, memories, progress, expected)
        else:
            report = inspect(path, parent, memories, progress, expected)
    if args.json:
        import msgspec

        text = msgspec.json.format(msgspec.json.encode(report), indent=2).decode()
    else:
        text = render(report, colour=sys.stdout.isatty(), every_layer=args.layers)
    _show(text)
    return 0 if report.sound else EXIT_FINDINGS


def _folder(name: str, flag: str) -> Path:
    """The folder meant: `default` and `default-bf16` by name, as in `eval`, else a path."""
    if name in ("default", "default-bf16"):
        from nvfp4_runtime.quantize.default_model import default_bf16, ensure_default_model

        return ensure_default_model() if name == "default" else default_bf16()
    return _named(name, flag)


def _named(path: str, flag: str) -> Path:
    if not path:
        raise ConfigError("the path is empty; give a folder", flag)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: {error}; give the folder's full path", flag) from error


def _show(text: str) -> None:
    """Print, and find out here whether a full disk or a reader that left swallowed it, not as the interpreter ends."""
    try:
        print(text)
        sys.stdout.flush()
    except OSError as error:
        # what is still buffered goes nowhere: the interpreter would try it again at its end, and fail again
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise CheckpointError(f"the report could not be written: {error.strerror or error}") from error


@contextmanager
def _bars(show: bool) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Progress bars on a terminal, gone when the block ends; elsewhere nothing."""
    from tqdm import tqdm

    with ExitStack() as stack:

        def start(what: str, total: int) -> Callable[[int], None]:
            bar = stack.enter_context(
                tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False, disable=not show)
            )

            def advance(nbytes: int) -> None:
                bar.update(min(nbytes, total - bar.n))  # totals are estimates: never more than all of it

            return advance

        yield start
