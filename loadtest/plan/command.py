"""`python -m loadtest plan`, `calibrate` and `validate`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import msgspec

from loadtest.compare.loads import Load, Sizes
from loadtest.compare.report import Arrival
from loadtest.compare.sides import parse_model, resolve
from loadtest.neighbours import BUSY_CORES
from loadtest.plan.calibrate import Limits, calibrate
from loadtest.plan.checkpoint import read_weights
from loadtest.plan.gpus import GPUS, find_gpu
from loadtest.plan.simulate import Machine, Simulation, WordTokens
from loadtest.plan.steps import Measured, MeasuredTimes, Modelled, Ranks
from loadtest.plan.validate import table, validate
from loadtest.traffic.call import Conversation
from loadtest.traffic.figures import SLO, Figures, figures
from loadtest.traffic.traces import read_trace, replay
from loadtest.traffic.workloads import WORKLOADS, at_instants, conversations, find_workload, poisson

MOST_REPLICAS = 1000
KV_SHARE = 0.9  # of a GPU's memory, weights and cache together, as the server's default has it


def add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("plan", help="how many replicas a load needs, by simulation over our scheduler")
    add = parser.add_argument
    add("--model", metavar="DIR", help="its size and shape; not needed with a file of measured steps")
    add("--gpu", required=True, metavar="NAME|FILE", help=f"{', '.join(GPUS)} (modelled), or a file of `calibrate`")
    add("--numerics", choices=("w4a16", "w4a4"), default="w4a16", help="for modelled GPUs (%(default)s)")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="modelled GPUs of each replica (%(default)s)")
    add("--workload", default="chat", help=f"{', '.join(WORKLOADS)}, or lengths such as 1024/128 (%(default)s)")
    add("--rate", type=float, default=10.0, help="conversations a second (%(default)s)")
    add("--seconds", type=float, default=60.0, help="of arrivals (%(default)s)")
    add("--trace", type=Path, metavar="FILE", help="instead of a workload: Mooncake's or BurstGPT's format")
    add("--speedup", type=float, default=1.0, help="of the trace")
    add("--scale", type=float, default=1.0, help="of all lengths")
    add(
        "--replicas",
        default="auto",
        metavar="LIST|auto",
        help=f"auto: the fewest that keep the SLO, to {MOST_REPLICAS}",
    )
    add("--slo", type=_slo, default=SLO(), metavar="ttft=S,tpot=S", help="(ttft=1,tpot=0.05)")
    add("--attainment", type=float, default=0.95, help="share of requests that must keep it (%(default)s)")
    add("--max-num-seqs", type=int, default=256, help="of modelled GPUs (%(default)s)")
    add("--max-num-batched-tokens", type=int, default=8192, help="of modelled GPUs (%(default)s)")
    add("--max-model-len", type=int, help="(default: the model's)")
    add("--seed", default="0")
    add("--json", type=Path, metavar="FILE")
    parser.set_defaults(run=plan)


def add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("calibrate", help="measure a server's steps, for `plan --gpu FILE`")
    _add_server(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.set_defaults(run=run_calibrate)


def add_validate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("validate", help="a simulation beside the real server, under the same load")
    _add_server(parser)
    add = parser.add_argument
    add("--measured", type=Path, metavar="FILE", help="of `calibrate` (default: calibrate first)")
    add("--workload", default="chat", help="(%(default)s)")
    add("--concurrency", default="2,8", metavar="LIST")
    add("--rate", default="", metavar="LIST")
    add("--seconds", type=float, default=20.0, help="of open loops (%(default)s)")
    add("--per-user", type=int, default=4)
    add("--passes", type=int, default=1, help="through all loads; medians are compared (%(default)s)")
    add("--scale", type=float, default=1.0)
    add("--json", type=Path, metavar="FILE")
    parser.set_defaults(run=run_validate)


def _add_server(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar='"DIR FLAGS"', help="a folder, default or default-bf16, and flags of serve")
    add("--max-num-seqs", type=int, default=64, help="(%(default)s)")
    add("--max-num-batched-tokens", type=int, default=1024, help="(%(default)s)")
    add("--max-context", type=int, default=1024, metavar="WORDS", help="longest prompt that is timed (%(default)s)")


@dataclass(frozen=True)
class Row:
    """One number of replicas."""

    replicas: int
    figures: Figures
    busy: float
    preemptions: int
    prefix_hits: float


def plan(args: argparse.Namespace) -> int:
    machine, tokenize, about = _machine(args)
    talks = _talks(args)
    rows = _rows(args, machine, tokenize, talks)
    print(f"step times: {machine.times.source}")
    print(f"{about}; {len(talks)} conversations over {talks[-1].at:.0f} s")
    print(_table(rows))
    kept = [row for row in rows if (row.figures.attainment or 0.0) >= args.attainment]
    fewest = min((row.replicas for row in kept), default=None)
    slo = f"ttft {args.slo.ttft:g} s, tpot {args.slo.tpot:g} s for {100 * args.attainment:g} % of the requests"
    print(f"none of them keeps {slo}" if fewest is None else f"{fewest} replica(s) keep {slo}")
    if args.json is not None:
        made = {"step_times": machine.times.source, "fewest": fewest, "rows": msgspec.to_builtins(rows)}
        args.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0 if fewest is not None else 1


def _slo(text: str) -> SLO:
    try:
        return SLO.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_measured(file: Path) -> Measured:
    """ValueError where it is no file of `calibrate`."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Measured)
    except msgspec.DecodeError as error:
        raise ValueError(f"{file}: not a file of `python -m loadtest calibrate`: {error}") from error


def measured_machine(measured: Measured, max_model_len: int | None = None) -> tuple[Machine, WordTokens]:
    machine = Machine(
        MeasuredTimes(measured),
        measured.max_num_seqs,
        measured.max_num_batched_tokens,
        measured.block_size,
        measured.kv_tokens,
        max_model_len or measured.kv_tokens,
        measured.front_seconds,
    )
    return machine, WordTokens(measured.template_tokens, measured.tokens_per_word)


def _machine(args: argparse.Namespace) -> tuple[Machine, WordTokens, str]:
    if Path(args.gpu).is_file():
        if args.tensor_parallel_size != 1:
            raise ValueError("--tensor-parallel-size is of modelled GPUs; calibrate a server that has it instead")
        measured = read_measured(Path(args.gpu))
        return *measured_machine(measured, args.max_model_len), f"{measured.model}, {measured.kv_tokens:,} KV tokens"
    gpu = find_gpu(args.gpu)
    if args.model is None:
        raise ValueError("a modelled GPU needs --model DIR, for the size and shape of what it runs")
    whole = read_weights(resolve(args.model))
    ranks = Ranks(args.tensor_parallel_size, whole.hidden_size, whole.num_layers)
    weights = whole.part(ranks.count)
    kv_tokens = int((KV_SHARE * gpu.memory_bytes - weights.weight_bytes) / weights.kv_token_bytes)
    longest = args.max_model_len or weights.max_model_len
    if kv_tokens < longest:
        raise ValueError(
            f"{args.model} does not fit: {weights.weight_bytes / 1e9:.1f} GB of weights leave room for "
            f"{max(kv_tokens, 0):,} tokens in {KV_SHARE:.0%} of {gpu.memory_bytes / 1e9:.0f} GB, and a request may "
            f"have {longest:,}; take a larger GPU or a smaller --max-model-len"
        )
    times = Modelled(gpu, weights.cost, args.numerics, ranks)
    machine = Machine(times, args.max_num_seqs, args.max_num_batched_tokens, 16, kv_tokens, longest)
    about = f"{args.model}, {weights.weight_bytes / 1e9:.2f} GB on each GPU, {kv_tokens:,} KV tokens"
    return machine, WordTokens(), about


def _talks(args: argparse.Namespace) -> list[Conversation]:
    if args.trace is not None:
        return replay(read_trace(args.trace), args.seed, args.speedup, args.scale)
    source = conversations(find_workload(args.workload).scaled(args.scale), f"plan {args.seed}")
    return at_instants(source, poisson(args.rate, args.seconds, f"plan {args.seed}"))


def _rows(args: argparse.Namespace, machine: Machine, tokenize: WordTokens, talks: Sequence[Conversation]) -> list[Row]:
    """Of those asked for; auto: doubling until the SLO is kept, then halving the interval."""

    def row(replicas: int) -> Row:
        print(f"simulating {replicas} replicas", file=sys.stderr)
        result = Simulation(machine, replicas, talks, tokenize).run()
        found = figures(result.outcomes, args.slo)
        return Row(replicas, found, result.busy, result.preemptions, result.prefix_hits)

    if args.replicas != "auto":
        return [row(count) for count in _counts(args.replicas)]
    found: dict[int, Row] = {}

    def kept(count: int) -> bool:
        if count not in found:
            found[count] = row(count)
        return bool((found[count].figures.attainment or 0.0) >= args.attainment)

    most = min(MOST_REPLICAS, len(talks))  # more have nothing to do
    high = 1
    while not kept(high) and high < most:
        high = min(2 * high, most)
    low = high // 2
    while kept(high) and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if kept(middle) else (middle, high)
    return [found[count] for count in sorted(found)]


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 1 <= int(part) <= MOST_REPLICAS for part in parts):
        raise ValueError(f"--replicas: expected counts of 1 to {MOST_REPLICAS} such as 1,2,4, or auto; found {text!r}")
    return [int(part) for part in parts]


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| replicas | tokens/s | TTFT p50 / p95, ms | gap p95, ms | e2e p95, s | goodput/s | SLO kept | busy "
        "| prefix hits | preempted | failed |",
        f"|{' ---: |' * 11}",
    ]
    for row in rows:
        found = row.figures
        ttft, gap, e2e = found.ttft, found.gap, found.e2e
        cells = (
            f"{row.replicas}",
            f"{found.output_per_second:,.0f}",
            f"{1e3 * ttft.p50:.0f} / {1e3 * (ttft.p95 or 0):.0f}" if ttft else "-",
            f"{1e3 * (gap.p95 or 0):.1f}" if gap else "-",
            f"{e2e.p95:.2f}" if e2e else "-",
            f"{found.goodput:.2f}",
            f"{100 * (found.attainment or 0.0):.1f} %",
            f"{100 * row.busy:.0f} %",
            f"{100 * row.prefix_hits:.0f} %",
            f"{row.preemptions}",
            f"{sum(found.failures.values())}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run_calibrate(args: argparse.Namespace) -> int:
    limits = Limits(args.max_num_seqs, args.max_num_batched_tokens, args.max_context)
    found = calibrate(parse_model(f"server={args.model}"), limits, lambda line: print(line, flush=True))
    args.output.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    return 0


def run_validate(args: argparse.Namespace) -> int:
    candidate = parse_model(f"server={args.model}")
    limits = Limits(args.max_num_seqs, args.max_num_batched_tokens, args.max_context)
    say = partial(print, file=sys.stderr, flush=True)
    measured = read_measured(args.measured) if args.measured else calibrate(candidate, limits, say)
    machine, tokenize = measured_machine(measured)
    loads = [Load(args.workload, Arrival("closed", float(each))) for each in args.concurrency.split(",") if each]
    loads += [Load(args.workload, Arrival("poisson", float(each))) for each in args.rate.split(",") if each]
    sizes = Sizes(args.per_user, args.seconds, args.scale)
    found = validate(candidate, limits, loads, sizes, machine, tokenize, say, max(1, args.passes))
    print(table(found))
    busy = max((each.other_cores or 0.0 for each in found), default=0.0)
    if busy > BUSY_CORES:
        print(f"others used up to {busy:.1f} cores meanwhile: no figures to quote")
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n", encoding="utf-8")
    return 0
