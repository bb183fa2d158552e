"""`python -m loadtest COMMAND`: see docs/loadtest.md. The other measurements are modules of their own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from loadtest.compare.command import add_compare, add_diff, add_render, print_schema
from loadtest.plan.command import add_calibrate, add_plan, add_validate
from loadtest.traffic.command import add_truth


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description="Load tests over HTTP.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_compare(commands)
    add_diff(commands)
    add_render(commands)
    add_plan(commands)
    add_calibrate(commands)
    add_validate(commands)
    add_truth(commands)
    commands.add_parser("schema", help="JSON Schema of report.json").set_defaults(run=print_schema)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
