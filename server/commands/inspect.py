"""`nvfp4 inspect PATH`."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser("inspect", help="say what is in a checkpoint")
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from nvfp4_runtime.checkpoint.inspect import inspect, render

    report = inspect(args.path)
    if args.json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        print(render(report))
    return 0
