"""`python -m nvfp4_runtime.distill.reproduce [CLAIM ...]`: measure published claims again, print the table."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from nvfp4_runtime.distill.reproduce import memory, scales, toy, values
from nvfp4_runtime.distill.reproduce.table import Row, render

CLAIMS = ("scale-error", "value-error", "memory", "distillation", "robustness")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nvfp4_runtime.distill.reproduce", description=__doc__)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"of {', '.join(CLAIMS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="toy models of the two that train (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=toy.STEPS, help="of distillation (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args(argv)
    for claim in args.claims:
        if claim not in CLAIMS:
            parser.error(f"unknown claim {claim!r}; expected some of {', '.join(CLAIMS)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger(toy.__name__).setLevel(logging.INFO)  # each toy's figures as they come
    wanted = args.claims or list(CLAIMS)
    measured: dict[str, Callable[[], list[Row]]] = {
        "scale-error": scales.run,
        "value-error": values.run,
        "memory": memory.run,
    }
    rows, begun = list[Row](), time.perf_counter()
    for claim in wanted:
        if claim in measured:
            rows += measured[claim]()
    if trains := [claim for claim in wanted if claim in ("distillation", "robustness")]:
        rows += toy.run(trains, seeds=args.seeds, steps=args.steps)
    print(render(rows))
    print(f"\n{time.perf_counter() - begun:.0f} s on {torch.get_num_threads()} threads", file=sys.stderr)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
