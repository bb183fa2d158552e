"""The report in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from loadtest.compare.diff import Change
from loadtest.compare.report import Cell, Estimate, Interval, Report, Side, Versus
from loadtest.compare.verdict import METRICS
from loadtest.neighbours import BUSY_CORES

WITHIN_SLO = 0.95
COLUMNS = (
    ("tokens/s", "output_per_second"), ("per user", "per_user"), ("TTFT p50", "ttft_p50"), ("p95", "ttft_p95"),
    ("p99", "ttft_p99"), ("gap p50", "gap_p50"), ("p95", "gap_p95"), ("p99", "gap_p99"), ("e2e p95", "e2e_p95"),
    ("goodput/s", "goodput"), ("J/token", "joules_per_token"),
)  # fmt: skip


def shown(value: Interval, metric: str, bounds: bool = True) -> str:
    """12.3 [11.9, 12.8], in the metric's unit."""
    scale = METRICS[metric].scale
    median, low, high = (number(each * scale) for each in (value.median, value.low, value.high))
    return f"{median} [{low}, {high}]" if bounds else median


def number(value: float) -> str:
    """Three digits that matter, at most two after the point."""
    if value and abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def estimate(value: Estimate | None, digits: int) -> str:
    if value is None:
        return "-"
    if value.low is None or value.high is None:
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def gigabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f}"


def console() -> Console:
    """As wide as the terminal; where there is none, as wide as the tables."""
    found = Console()
    return found if found.is_terminal else Console(width=150)


def show(report: Report, console: Console) -> None:
    """Who was compared, a table for each load, the verdicts, and what to know besides."""
    console.print(_sides(report.sides))
    for workload, arrival in dict.fromkeys((cell.workload, cell.arrival) for cell in report.cells):
        alike = [cell for cell in report.cells if (cell.workload, cell.arrival) == (workload, arrival)]
        console.print(_load(f"{workload}, {arrival}", alike))
    if report.versus:
        console.print(_versus(report))
    for verdict in report.verdicts:
        better = f"[bold]{verdict.winner}[/bold]" if verdict.winner else "no winner"
        console.print(f"  {verdict.workload}, {verdict.arrival}, {verdict.metric}: {better} ({verdict.why})")
    for line in within_slo(report):
        console.print(f"  {line}", markup=False)
    for note in remarks(report):
        console.print(f"note: {note}", markup=False)


def change(found: Versus) -> str:
    """+12.3 % better, or within the scatter."""
    word = {True: "better", False: "worse", None: "no difference shown"}[found.better]
    return f"{100 * found.change:+.1f} %, {word}"


def versus_rows(report: Report) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
    """The sides beside the first, and for each load and metric what became of each."""
    labels = list(dict.fromkeys(each.side for each in report.versus))
    rows = []
    for workload, arrival, metric in dict.fromkeys((e.workload, e.arrival, e.metric) for e in report.versus):
        found = {e.side: e for e in report.versus if (e.workload, e.arrival, e.metric) == (workload, arrival, metric)}
        rows.append((f"{workload}, {arrival}", metric, [change(found[x]) if x in found else "-" for x in labels]))
    return labels, rows


def _versus(report: Report) -> Table:
    labels, rows = versus_rows(report)
    table = Table(title=f"against {report.versus[0].baseline}: change of the median")
    for name in ("load", "metric", *labels):
        table.add_column(name, justify="left" if name in ("load", "metric") else "right")
    for load, metric, cells in rows:
        table.add_row(load, metric, *cells)
    return table


def within_slo(report: Report) -> list[str]:
    """For each workload with closed loops, the most users that each side had within the SLO."""
    found = []
    for workload in dict.fromkeys(cell.workload for cell in report.cells if cell.arrival.kind == "closed"):
        most = dict.fromkeys((side.label for side in report.sides), 0.0)
        for cell in report.cells:
            kept = "attainment" in cell.metrics and cell.metrics["attainment"].median >= WITHIN_SLO
            if kept and (cell.workload, cell.arrival.kind) == (workload, "closed"):
                most[cell.side] = max(most[cell.side], cell.arrival.value)
        each = ", ".join(f"{side} {users:g}" for side, users in most.items())
        found.append(f"{workload}, most users with {100 * WITHIN_SLO:.0f} % of answers within the SLO: {each}")
    return found


def remarks(report: Report) -> list[str]:
    """The report's notes, and what its runs say of themselves."""
    found = list(report.notes)
    complaints = [why for run in report.runs for why in run.complaints]
    for kind in dict.fromkeys(why.partition(":")[0] for why in complaints):
        alike = [why for why in complaints if why.partition(":")[0] == kind]
        found.append(f"{len(alike)} of {len(report.runs)} runs invalid and left out, for one: {alike[0]}")
    busy = [run.other_cores for run in report.runs if run.other_cores is not None and run.other_cores > BUSY_CORES]
    if busy:
        found.append(f"others used up to {max(busy):.1f} cores during {len(busy)} of {len(report.runs)} runs")
    merged = [run for run in report.runs if (share := run.figures.events_per_token) is not None and share < 0.95]
    if merged:
        found.append(
            f"in {len(merged)} runs several tokens came in one event: gaps are between events there, TPOT is per token"
        )
    for side in report.sides:
        if missing := untold(side):
            found.append(f"{side.label} does not tell: {', '.join(missing)}")
        short = sum(run.figures.short_answers for run in report.runs if run.side == side.label)
        if short:
            whole = sum(run.figures.whole for run in report.runs if run.side == side.label)
            found.append(
                f"{side.label} ended {short} of {whole} answers before the length asked for (it may not know "
                "ignore_eos), so its work is not the others'"
            )
    failed = _counted([why for run in report.runs for why, n in run.figures.failures.items() for _ in range(n)])
    return found + [f"{count} request(s) failed and are in no average: {why}" for why, count in failed.items()]


def untold(side: Side) -> list[str]:
    """Columns that stay empty since the server says nothing of them."""
    known = {
        "numerics": side.numerics, "kernels": side.kernels, "weights": side.memory.weight_bytes,
        "KV tokens": side.memory.kv_tokens, "KV bytes": side.memory.kv_bytes, "resident memory": side.memory.rss_bytes,
    }  # fmt: skip
    return [name for name, value in known.items() if not value]


def _counted(reasons: Sequence[str]) -> dict[str, int]:
    return {why: reasons.count(why) for why in dict.fromkeys(reasons)}


def _sides(sides: Sequence[Side]) -> Table:
    table = Table(title="compared")
    for name in ("", "numerics", "weights GB", "KV tokens", "KV GB", "RSS GB", "perplexity", "KL", "same top token"):
        table.add_column(name, justify="left" if not name or name == "numerics" else "right")
    for side in sides:
        memory, quality = side.memory, side.quality
        table.add_row(
            side.label,
            side.numerics or ("foreign" if side.foreign else "-"),
            gigabytes(memory.weight_bytes),
            "-" if memory.kv_tokens is None else f"{memory.kv_tokens:,}",
            gigabytes(memory.kv_bytes),
            gigabytes(memory.rss_bytes),
            estimate(quality.perplexity, 2),
            estimate(quality.kl, 3),
            estimate(quality.top1, 3),
        )
    return table


def _load(title: str, cells: Sequence[Cell]) -> Table:
    columns = [(head, name) for head, name in COLUMNS if any(name in cell.metrics for cell in cells)]
    table = Table(title=f"{title} (latencies in ms; medians of repeats)")
    table.add_column("")
    for head, _ in columns:
        table.add_column(head, justify="right")
    for cell in cells:
        label = f"{cell.side} ({cell.invalid} invalid)" if cell.invalid else cell.side
        values = [shown(cell.metrics[name], name, False) if name in cell.metrics else "-" for _, name in columns]
        table.add_row(label, *values)
    return table


def show_changes(found: Sequence[Change], limit: float, console: Console) -> None:
    table = Table(title=f"changes, failing beyond {100 * limit:g} % with intervals apart")
    for name in ("", "load", "metric", "old", "new", "worse by", ""):
        table.add_column(name, justify="left" if name in ("", "load", "metric") else "right")
    for each in found:
        word = "WORSE" if each.fails(limit) else "better" if each.apart and each.worse < 0 else ""
        table.add_row(
            each.side,
            f"{each.workload}, {each.arrival}",
            each.metric,
            shown(each.old, each.metric),
            shown(each.new, each.metric),
            f"{100 * each.worse:+.1f} %",
            word,
        )
    console.print(table)
