"""`python -m loadtest compare` and `python -m loadtest diff`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

import msgspec

from loadtest.compare.aiperf import Aiperf
from loadtest.compare.diff import changes, missing, parse_share
from loadtest.compare.external import read_runs
from loadtest.compare.loads import Load, Sizes
from loadtest.compare.machine import Energy, describe
from loadtest.compare.measure import Course, Step, measure
from loadtest.compare.quality import Task
from loadtest.compare.report import (
    Arrival,
    Engine,
    Memory,
    Quality,
    Report,
    Run,
    Side,
    read_report,
    write_report,
)
from loadtest.compare.sides import Candidate, parse_model, resolve
from loadtest.compare.verdict import MIN_REPEATS, cells, verdicts, versus
from loadtest.traffic.figures import SLO
from loadtest.traffic.workloads import WORKLOADS, find_workload

REPOSITORY = Path(__file__).parents[2]


def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("compare", help="several models or servers under the same load")
    add = parser.add_argument
    add("--model", action="append", default=[], metavar='"LABEL=DIR FLAGS"', help="served in turn; may repeat")
    add("--server", action="append", default=[], metavar="URL", help="one that runs already; may repeat, with --label")
    add("--label", action="append", default=[], metavar="NAME", help="of the --server at the same place")
    add(
        "--server-model",
        action="append",
        default=[],
        metavar="NAME",
        help="that its requests give (default: its first)",
    )
    add("--import", action="append", default=[], dest="imports", metavar="LABEL=FILE",
        help="a result of `vllm bench serve` or guidellm, as a side of its own")  # fmt: skip
    add("--api-key-env", metavar="VARIABLE", help="its value is sent as a bearer token")
    add("--limits", default="", metavar="FLAGS", help="of `nvfp4 serve`, the same for every model")
    add("--workload", default="chat", help=f"some of {', '.join(WORKLOADS)}, or lengths such as 1024/128 (%(default)s)")
    add("--trace", type=Path, action="append", default=[], metavar="FILE", help="Mooncake's or BurstGPT's format")
    add("--speedup", type=float, default=1.0, help="of traces")
    add("--concurrency", default="1,4,16", metavar="LIST", help="users of closed loops (%(default)s; empty: none)")
    add("--rate", default="", metavar="LIST", help="conversations a second of open loops, Poisson")
    add("--seconds", type=float, default=30.0, help="of arrivals of an open loop (%(default)s)")
    add("--per-user", type=int, default=4, help="conversations of each user of a closed loop (%(default)s)")
    add("--scale", type=float, default=1.0, help="of all lengths (%(default)s)")
    add("--passes", type=int, default=3, help="through all sides, there and back in turn (%(default)s)")
    add("--seed", type=int, default=0)
    add("--slo", type=_slo, default=SLO(), metavar="ttft=S,tpot=S", help="of a good answer (ttft=1,tpot=0.05)")
    add("--engine", choices=("builtin", "aiperf"), default="builtin")
    add("--aiperf", default="aiperf", metavar="PROGRAM", help="where it is not on PATH")
    add("--tokenizer", type=Path, metavar="DIR", help="for aiperf (default: the first model's folder)")
    add("--quality-text", type=Path, metavar="FILE", help="predicted for perplexity, KL and top-1 agreement")
    add("--quality-windows", type=int, default=16)
    add("--quality-window", type=int, default=1024, metavar="TOKENS")
    add("--teacher", metavar="DIR", help="whom KL is measured to (default: the first model)")
    add("--output", type=Path, default=Path("loadtest-report"), metavar="DIR", help="(%(default)s)")
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="for a whole answer (%(default)s)")
    parser.set_defaults(run=compare)


def add_diff(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "diff", help="what became worse from one report to the next; exit code 1 if something did"
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="report.json")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--fail-on", type=parse_share, default=0.05, metavar="SHARE", help="(5%%)")
    parser.set_defaults(run=diff)


def add_render(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("render", help="report.html, medians and verdicts anew from the runs in a report.json")
    parser.add_argument("report", type=Path, metavar="REPORT")
    parser.set_defaults(run=render)


def compare(args: argparse.Namespace) -> int:
    candidates, imported = _candidates(args), _imports(args)
    loads = _loads(args)
    if not candidates and not imported:
        raise ValueError("nobody to compare; give --model LABEL=DIR, --server URL or --import LABEL=FILE")
    labels = [candidate.label for candidate in candidates] + list(imported)
    if len(set(labels)) < len(labels):
        raise ValueError(f"every side needs a label of its own; found {', '.join(labels)}")
    course = _course(args, candidates, loads)
    args.output.mkdir(parents=True, exist_ok=True)
    with _progress() as step:
        sides, runs = measure(course, step) if candidates else ([], [])
    for label, theirs in imported.items():
        sides.append(_imported_side(label, theirs))
        runs += theirs
    return _write(_report(args, course, sides, runs), args.output)


def render(args: argparse.Namespace) -> int:
    found = read_report(args.report)
    judged = cells(found.runs)
    report = msgspec.structs.replace(
        found, cells=judged, verdicts=verdicts(judged), versus=versus(judged, found.sides[0].label)
    )
    return _write(report, args.report.parent)


def _write(report: Report, folder: Path) -> int:
    """1 if some cell has no valid run."""
    from loadtest.compare.page import page
    from loadtest.compare.table import console, show

    write_report(report, folder / "report.json")
    (folder / "report.html").write_text(page(report), encoding="utf-8")
    show(report, screen := console())
    screen.print(f"written: {folder / 'report.json'}, {folder / 'report.html'}", markup=False)
    return 0 if all(cell.metrics for cell in report.cells) else 1


def diff(args: argparse.Namespace) -> int:
    from loadtest.compare.table import console, show_changes

    old, new = read_report(args.old), read_report(args.new)
    found, lost = changes(old, new), missing(old, new)
    show_changes(found, args.fail_on, screen := console())
    for name in lost:
        screen.print(f"gone: {name}", markup=False)
    return 1 if lost or any(each.fails(args.fail_on) for each in found) else 0


def _slo(text: str) -> SLO:
    try:
        return SLO.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _candidates(args: argparse.Namespace) -> list[Candidate]:
    found = [parse_model(text) for text in args.model]
    for i, url in enumerate(args.server):
        label = args.label[i] if i < len(args.label) else f"server {i + 1}"
        found.append(Candidate(label, args.server_model[i] if i < len(args.server_model) else "", url=url.rstrip("/")))
    if len(args.label) > len(args.server):
        raise ValueError(f"{len(args.label)} --label for {len(args.server)} --server; models have theirs before the =")
    return found


def _imports(args: argparse.Namespace) -> dict[str, list[Run]]:
    found = {}
    for text in args.imports:
        label, _, file = text.partition("=")
        if not file:
            raise ValueError(f"expected LABEL=FILE, found {text!r}")
        found[label] = read_runs(Path(file), label, args.slo)
    return found


def _imported_side(label: str, runs: list[Run]) -> Side:
    note = "not measured: read from another tool's file"
    return Side(label, runs[0].engine, [], True, "", "", [], Memory(), Quality(note))


def _loads(args: argparse.Namespace) -> list[Load]:
    users = _numbers(args.concurrency, "--concurrency")
    if not all(each.is_integer() for each in users):
        raise ValueError(f"--concurrency: expected whole numbers of users, found {args.concurrency!r}")
    arrivals = [Arrival("closed", each) for each in users]
    arrivals += [Arrival("poisson", each) for each in _numbers(args.rate, "--rate")]
    names = [name.strip() for name in args.workload.split(",") if name.strip()] if arrivals else []
    turns = {name: find_workload(name).turns for name in names}
    if args.engine == "aiperf" and (args.trace or max(turns.values(), default=1) > 1):
        raise ValueError("the engine aiperf runs single calls, closed or poisson; use --engine builtin for the rest")
    loads = [Load(name, arrival) for name in names for arrival in arrivals]
    for trace in args.trace:
        if not trace.is_file():
            raise ValueError(f"--trace: there is no file {trace}")
        loads.append(Load(trace.name, Arrival("trace", args.speedup), trace))
    if not loads:
        raise ValueError("no load; give --concurrency, --rate or --trace")
    return loads


def _numbers(text: str, flag: str) -> list[float]:
    try:
        found = [float(each) for each in text.split(",") if each.strip()]
    except ValueError:
        found = [0.0]
    if any(each <= 0 for each in found):
        raise ValueError(f"{flag}: expected positive numbers such as 1,4,16, found {text!r}")
    return found


def _course(args: argparse.Namespace, candidates: list[Candidate], loads: list[Load]) -> Course:
    headers = {}
    if args.api_key_env:
        if not (key := os.environ.get(args.api_key_env)):
            raise ValueError(f"--api-key-env: the variable {args.api_key_env} is not set")
        headers["authorization"] = f"Bearer {key}"
    models = [candidate.model for candidate in candidates if candidate.url is None]
    task = None
    if args.quality_text is not None:
        if not args.quality_text.is_file():
            raise ValueError(f"--quality-text: there is no file {args.quality_text}")
        teacher = str(resolve(args.teacher)) if args.teacher else models[0] if models else None
        task = Task(args.quality_text, args.quality_windows, args.quality_window, teacher)
    engine: Engine = args.engine
    assert engine in get_args(Engine)
    course = Course(
        candidates,
        loads,
        Sizes(args.per_user, args.seconds, args.scale, args.seed),
        args.slo,
        args.passes,
        shlex.split(args.limits),
        headers,
        engine,
        quality=task,
        timeout_seconds=args.timeout,
    )
    if engine != "aiperf":
        return course
    tokenizer = args.tokenizer or (Path(models[0]) if models else Path())
    return replace(course, aiperf=Aiperf.find(args.aiperf, tokenizer))


def _report(args: argparse.Namespace, course: Course, sides: list[Side], runs: list[Run]) -> Report:
    found = cells(runs)
    notes = [
        f"Intervals come from {course.passes} repeats: with three, they are the range from least to greatest.",
        "Prompts are the same for every side and new in every pass; failed requests are in no average.",
    ]
    if course.passes < MIN_REPEATS:
        notes.append(f"Fewer than {MIN_REPEATS} repeats: no winners.")
    if course.engine == "aiperf":
        notes.append("aiperf does not tell how its client fared: that it was no bottleneck is not shown.")
    if why := Energy().why_not:
        notes.append(why[0].upper() + why[1:] + ".")
    machine = describe(REPOSITORY)
    if any(name in machine.get("gpu", "") for name in ("H100", "H200")):
        notes.append("This GPU has no FP4 tensor cores: NVFP4 saves memory and bandwidth here, and no arithmetic.")
    if any(side.foreign for side in sides):
        notes.append("A server that ran already kept its memory, and what it did beside, while others were measured.")
    return Report(
        format="nvfp4-loadtest-report-1",
        made_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command="python -m loadtest " + shlex.join(sys.argv[1:]),
        machine=machine,
        seed=args.seed,
        slo=args.slo,
        limits=list(course.limits),
        sides=sides,
        runs=runs,
        cells=found,
        verdicts=verdicts(found),
        versus=versus(found, sides[0].label),
        notes=notes,
    )


@contextmanager
def _progress() -> Iterator[Step]:
    """A bar on a terminal; elsewhere a line for each thing begun."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        last = ""

        def tell(what: str, done: int, of: int) -> None:
            nonlocal last
            if what != last:
                console.print(what, markup=False, highlight=False)
                last = what

        yield tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        task = progress.add_task("", total=None)
        yield lambda what, done, of: progress.update(task, description=what, completed=done, total=of or None)


def print_schema(args: argparse.Namespace) -> int:
    from loadtest.compare.report import schema

    print(json.dumps(schema(), indent=1))
    return 0
