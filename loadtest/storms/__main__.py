"""`python -m loadtest.storms NAME`: see docs/reliability.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from loadtest.neighbours import Neighbours
from loadtest.storms import aborts, connections, determinism, grammars, soak, streams
from loadtest.storms.verdict import Verdict

STORMS: dict[str, Callable[[int | None, float | None, bool], Verdict]] = {
    "aborts": aborts.run,
    "streams": streams.run,
    "connections": connections.run,
    "grammars": grammars.run,
    "determinism": determinism.run,
    "soak": soak.run,
}


def run(name: str, count: int | None, seconds: float | None, short: bool) -> Verdict:
    """One storm. `count` and `seconds` None: its own, by `short`."""
    neighbours, started = Neighbours(), time.monotonic()
    verdict = STORMS[name](count, seconds, short)
    verdict.seconds = round(time.monotonic() - started, 1)
    busy = neighbours.cores()
    verdict.busy_cores = None if busy is None else round(busy, 2)
    return verdict


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.storms",
        description="Start a server, storm it, say which promises it kept. Exit code 1 if one was broken.",
    )
    parser.add_argument(
        "names", nargs="+", choices=(*STORMS, "all"), metavar="NAME", help=f"{', '.join(STORMS)} or all"
    )
    parser.add_argument("--short", action="store_true", help="the size that CI runs")
    parser.add_argument("--count", type=int, help="of aborts, streams, connections, grammars or prompts")
    parser.add_argument("--seconds", type=float, help="of the soak")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdict; {} becomes the storm's name")
    args = parser.parse_args(argv)
    verdicts = []
    for name in STORMS if "all" in args.names else args.names:
        verdicts.append(run(name, args.count, args.seconds, args.short))
        print(verdicts[-1].text(), flush=True)
        if args.json is not None:
            verdicts[-1].write(Path(str(args.json).replace("{}", name)))
    return 0 if all(verdict.kept for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
