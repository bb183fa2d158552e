"""What each quantisation method costs: quantise by all of them, evaluate each against its parent, write the table.

    python -m nvfp4_runtime.evaluate.compare --text FILE [--methods max mse ...] [--docs docs/quality.md] [--json FILE]

Every method gets the same calibration text (the packaged one, or --calib FILE), which must not be part of the text that
is evaluated. All students and their parent see every window side by side, so methods are compared by the differences of
their KL on the same windows, whose intervals are far smaller than those of the KL itself.
"""

from __future__ import annotations

import argparse
import inspect
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np

from nvfp4_runtime.config import Numerics
from nvfp4_runtime.errors import ConfigError, NVFP4Error
from nvfp4_runtime.evaluate.divergence import Interval
from nvfp4_runtime.evaluate.document import commit, markdown_table, replace_section
from nvfp4_runtime.evaluate.evaluate import evaluate
from nvfp4_runtime.evaluate.report import Measured, Report, with_interval
from nvfp4_runtime.evaluate.scorer import Side, find_model
from nvfp4_runtime.evaluate.windows import cut, read_text
from nvfp4_runtime.quantize.default_model import calibration_texts
from nvfp4_runtime.quantize.pipeline import METHODS, quantize_folder
from nvfp4_runtime.text.tokenizer import Tokenizer

BASELINE = "max"
SECTION = "quality"
OVERLAP_CHARS = 100  # that many equal characters in a row are no accident


class Row(msgspec.Struct):
    """One method in one arithmetic. `against_max`: KL minus that of `max`, window by window; None for `max` itself.

    quantize_seconds  wall time, calibration included
    """

    method: str
    numerics: str
    quantize_seconds: float
    measured: Measured
    against_max: Interval | None = None


class Comparison(msgspec.Struct):
    """Everything a run found, and how to repeat it."""

    command: str
    commit: str
    made_at: str
    machine: str
    calibration: str
    default_method: str
    report: Report
    rows: list[Row]


def compare(
    parent: Path,
    text: Path,
    methods: Sequence[str],
    numerics: Sequence[Numerics],
    *,
    calib: Sequence[str],
    window: int = 1024,
    windows: int | None = None,
    work: Path,
) -> tuple[Report, list[Row]]:
    """Quantise `parent` by every method into folders in `work`, and evaluate all of them in one go.

    work  what an earlier call with the same parent and calibration left there is taken as it is
    Raises ConfigError when text and calibration overlap, and what quantising and evaluating raise.
    """
    evaluated = read_text(text)
    check_apart(calib, evaluated)
    tokenizer = Tokenizer.load(parent)
    cut_windows = cut(tokenizer, evaluated, window, windows, source=text.name)
    seconds: dict[str, float] = {}
    for method in methods:
        seconds[method] = quantize(parent, work / method, method, calib)
    pairs = [(method, each) for method in methods for each in numerics]
    sides = [Side(work / method, each) for method, each in pairs]
    report = evaluate(sides, cut_windows, tokenizer, Side(parent), worst=0, progress=True)
    rows = [
        Row(method, each, seconds[method], measured)
        for (method, each), measured in zip(pairs, report.students, strict=True)
    ]
    for row in rows:
        base = next((r for r in rows if (r.method, r.numerics) == (BASELINE, row.numerics)), None)
        if base is not None and base is not row:
            ours, theirs = (np.array(kl_by_window(one.measured)) for one in (row, base))
            row.against_max = Interval.over(ours - theirs, len(ours))
    return report, rows


def quantize(parent: Path, out: Path, method: str, calib: Sequence[str]) -> float:
    """Make the folder `out` unless it is there; the seconds that took, which a file beside it remembers."""
    took = out.with_name(f"{out.name}.seconds")
    if out.is_dir() and took.is_file():
        return float(took.read_text())
    started = time.perf_counter()
    quantize_folder(parent, out, method=method, calib_texts=calib)
    seconds = time.perf_counter() - started
    took.write_text(f"{seconds:.1f}\n")
    return seconds


def first_tokens(texts: Sequence[str], tokenizer: Tokenizer, count: int) -> list[str]:
    """The beginning of the texts, up to `count` tokens in all."""
    found: list[str] = []
    for text in texts:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if count > 0:
            found.append(text if len(tokens) <= count else tokenizer.decode(tokens[:count], skip_special_tokens=False))
        count -= len(tokens)
    return found


def kl_by_window(measured: Measured) -> list[float]:
    assert measured.divergence is not None, "students of a comparison have a teacher"
    return measured.divergence.kl_by_window


def check_apart(calib: Sequence[str], evaluated: str) -> None:
    """Raise ConfigError where a stretch of the calibration texts stands in the evaluated text."""
    for text in calib:
        for start in range(0, max(1, len(text) - OVERLAP_CHARS + 1), OVERLAP_CHARS):
            stretch = text[start : start + OVERLAP_CHARS]
            if len(stretch) == OVERLAP_CHARS and stretch in evaluated:
                raise ConfigError(
                    f"the calibration text and the evaluated one share {stretch[:40]!r}...: a model must not be "
                    "calibrated on what it is measured on; give another --calib",
                    "--calib",
                )


def render(found: Comparison) -> str:
    """The table as Markdown, and in words which methods helped and which did not."""
    report, rows = found.report, found.rows
    assert report.teacher is not None
    parent = report.teacher
    table: list[tuple[str, ...]] = [
        ("method", "numerics", "perplexity", "KL to parent, nats", "KL less than max", "KL p99", "same top token")
    ]
    table[0] += ("MB", "quantise, s")
    base = {row.numerics: _kl(row) for row in rows if row.method == BASELINE}
    size = f"{sum(parent.weight_bytes.values()) / 1e6:.1f}"
    table += [("parent", parent.numerics, f"{parent.perplexity.mean:.2f}", "0", "", "0", "1", size, "")]
    for row in rows:
        divergence = row.measured.divergence
        assert divergence is not None
        less = ""
        if row.against_max is not None and row.numerics in base:
            less = f"{-row.against_max.mean / base[row.numerics]:+.1%} ({with_interval(row.against_max, 4)})"
        table.append(
            (
                row.method + (" (default)" if row.method == found.default_method else ""),
                row.numerics,
                f"{row.measured.perplexity.mean:.2f}",
                with_interval(divergence.kl, 4),
                less,
                f"{divergence.kl_percentiles['p99']:.3f}",
                f"{divergence.top1_agreement.mean:.4f}",
                f"{sum(row.measured.weight_bytes.values()) / 1e6:.1f}",
                f"{row.quantize_seconds:.0f}",
            )
        )
    facts = [
        f"{parent.model}, {report.num_scored:,} positions of {report.text} (sha256 {report.text_sha256[:16]}), "
        f"{report.num_windows} windows of {report.window}. {found.made_at}, commit {found.commit}, {found.machine}. "
        f"Calibration: {found.calibration}.",
        f"`{found.command}`",
        markdown_table(table, left=2),
        report.protocol,
        f'Brackets: {report.intervals} "KL less than max" has in brackets KL minus `max`\'s KL on the same windows.',
        verdict(rows, found.default_method),
    ]
    return "\n\n".join(facts)


def verdict(rows: Sequence[Row], default_method: str) -> str:
    """Per arithmetic, the methods from best to worst, and which are not better than `max` beyond their interval."""
    lines = []
    for numerics in dict.fromkeys(row.numerics for row in rows):
        mine = sorted((row for row in rows if row.numerics == numerics), key=_kl)
        ranking = ", ".join(f"{row.method} {_kl(row):.4f}" for row in mine)
        failed = [row.method for row in mine if row.against_max is not None and not _better(row)]
        lines.append(f"- {numerics}, best first: {ranking}.")
        if failed:
            marked = (f"{method} (the default)" if method == default_method else method for method in failed)
            lines.append(f"- {numerics}, not better than `max` beyond the windows' scatter: {', '.join(marked)}.")
    return "\n".join(lines)


def _better(row: Row) -> bool:
    return row.against_max is not None and row.against_max.high is not None and row.against_max.high < 0


def _kl(row: Row) -> float:
    assert row.measured.divergence is not None
    return row.measured.divergence.kl.mean


def default_method() -> str:
    """What `nvfp4 quantize` does unless told otherwise."""
    return str(inspect.signature(quantize_folder).parameters["method"].default)


def machine() -> str:
    """The processor's name and how many there are."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="what is predicted")
    parser.add_argument("--model", default="default-bf16", metavar="FOLDER", help="plain parent (default: %(default)s)")
    parser.add_argument("--calib", type=Path, metavar="FILE", help="default: the packaged text")
    parser.add_argument(
        "--calib-tokens", type=int, default=8192, metavar="N", help="of it, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep quantised folders here, and take those that are there already"
    )
    parser.add_argument("--only-quantize", action="store_true", help="fill --work and evaluate nothing")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--numerics", nargs="+", choices=get_args(Numerics), default=["w4a16", "w4a4"])
    parser.add_argument("--windows", type=int, help="default: 16, or as many as there are")
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window (default: %(default)s)")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="put the table between this document's markers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, for programs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    given = list(sys.argv[1:] if argv is None else argv)
    made_at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    try:
        parent = find_model(args.model)
        calib = calibration_texts(parent) if args.calib is None else [read_text(args.calib)]
        calib = first_tokens(calib, Tokenizer.load(parent), args.calib_tokens)
        if args.only_quantize:
            if args.work is None:
                raise ConfigError("what is only quantised needs a folder to stay in", "--work")
            for method in args.methods:
                quantize(parent, args.work / method, method, calib)
            return 0
        with tempfile.TemporaryDirectory() as temporary:
            report, rows = compare(
                parent,
                args.text,
                args.methods,
                args.numerics,
                calib=calib,
                window=args.window,
                windows=args.windows,
                work=args.work or Path(temporary),
            )
        found = Comparison(
            command=" ".join(["python -m nvfp4_runtime.evaluate.compare", *given]),
            commit=commit(),
            made_at=made_at,
            machine=machine(),
            calibration=f"{args.calib or 'the packaged text'}, its first {args.calib_tokens} tokens",
            default_method=default_method(),
            report=report,
            rows=rows,
        )
        print(render(found))
        if args.json is not None:
            args.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
        if args.docs is not None:
            replace_section(args.docs, SECTION, render(found))
    except NVFP4Error as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1 if isinstance(error, ConfigError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
