"""`nvfp4 inspect PATH`: the checkpoint doctor. Exit code 0 sound, 1 warnings or errors, 2 unreadable."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

EXIT_FINDINGS = 1


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "inspect",
        help="say what is in a checkpoint and whether it is sound",
        description="Say what is stored in a checkpoint, layer by layer, and whether it is sound.",
        epilog="Exit code: 0 sound, 1 warnings or errors were found, 2 unreadable.",
    )
    parser.add_argument("path", metavar="PATH", help="model folder")
    parser.add_argument("--json", action="store_true", help="for programs: every layer, every finding")
    parser.add_argument(
        "--layers", action="store_true", help="a line for every layer, not one for those that are alike"
    )
    parser.add_argument("--parent", metavar="DIR", help="the plain model it was made of: measure the distance")
    parser.add_argument("--repair", metavar="OUT", help="write a sound copy into this new folder")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        action="append",
        type=_size,
        help="say what fits into so much memory, as 24GiB; may repeat (default: sizes of common cards)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from nvfp4_runtime.checkpoint.doctor.describe import MEMORIES
    from nvfp4_runtime.checkpoint.doctor.inspect import inspect
    from nvfp4_runtime.checkpoint.doctor.render import render
    from nvfp4_runtime.checkpoint.doctor.repair import inspect_and_repair

    memories = tuple(args.memory or MEMORIES)
    with _bars(show=sys.stderr.isatty() and not args.json) as progress:
        if args.repair is not None:
            report = inspect_and_repair(args.path, args.repair, args.parent, memories, progress)
        else:
            report = inspect(args.path, args.parent, memories, progress)
    if args.json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        print(render(report, colour=sys.stdout.isatty(), every_layer=args.layers))
    return 0 if report.sound else EXIT_FINDINGS


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


def _size(text: str) -> int:
    from server.cli import parse_bytes

    return parse_bytes(text)
