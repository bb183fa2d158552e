"""`python -m loadtest truth`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from loadtest.neighbours import BUSY_CORES, Neighbours
from loadtest.traffic.truth import clockwork_truth, simulated_truth


def add_truth(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("truth", help="the client's figures beside its servers'; exit code 1 if they are off")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="(%(default)s)")
    parser.add_argument("--step-seconds", type=float, default=0.01, help="between tokens (%(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="of each answer (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(run=truth)


def truth(args: argparse.Namespace) -> int:
    found = []
    neighbours = Neighbours()
    for measure in (clockwork_truth, simulated_truth):
        found.append(measure(args.rate, args.seconds, args.step_seconds, args.tokens))
        print(found[-1].text(), end="\n\n", flush=True)
    busy = neighbours.cores()
    if busy is not None and busy > BUSY_CORES:
        print(f"others used {busy:.1f} cores meanwhile: no figures to quote")
    if args.json is not None:
        record = {"runs": [asdict(each) for each in found], "other_cores": busy}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(each.kept and not each.condition.complaints() for each in found) else 1
