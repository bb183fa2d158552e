"""The report's plots, as SVG for one HTML file. matplotlib is in the extra `loadtest`."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from loadtest.compare.report import Cell, Report, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (6.4, 3.8)
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
)  # told apart by the colour-blind
MARKERS = "osD^vPX"


def plots(report: Report) -> list[tuple[str, str]]:
    """(title, SVG) of each plot that the report has figures for."""
    style = {
        side.label: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, side in enumerate(report.sides)
    }
    found = []
    for workload in dict.fromkeys(cell.workload for cell in report.cells):
        cells = [cell for cell in report.cells if cell.workload == workload]
        runs = [run for run in report.runs if run.workload == workload and run.valid]
        found += _of_workload(workload, cells, runs, style)
    if any(side.memory.weight_bytes or side.memory.kv_bytes for side in report.sides):
        found.append(("Memory", _draw(partial(_memory, report=report))))
    return found


def _of_workload(
    workload: str, cells: Sequence[Cell], runs: Sequence[Run], style: dict[str, dict[str, str]]
) -> list[tuple[str, str]]:
    found = []
    if any("per_user" in cell.metrics for cell in cells):
        found.append(
            (f"{workload}: throughput against interactivity", _draw(partial(_pareto, cells=cells, style=style)))
        )
    for what, name in (("time to first token", "ttft_curve"), ("gaps between events", "gap_curve")):
        if any(getattr(run.figures, name) for run in runs):
            found.append((f"{workload}: {what}", _draw(partial(_curves, runs=runs, name=name, style=style))))
    for kind, label in (("poisson", "offered requests/s"), ("closed", "users at once")):
        some = [cell for cell in cells if cell.arrival.kind == kind]
        if len({cell.arrival.value for cell in some}) < 2:
            continue
        title = f"{workload}: goodput over {label}"
        found.append((title, _draw(partial(_over, cells=some, name="goodput", label=label, style=style))))
        title = f"{workload}: latency over {label}"
        found.append((title, _draw(partial(_over, cells=some, name="e2e_p95", label=label, style=style))))
    if any("joules_per_token" in cell.metrics for cell in cells):
        found.append(
            (
                f"{workload}: energy",
                _draw(partial(_over, cells=cells, name="joules_per_token", label="load", style=style)),
            )
        )
    return found


def _draw(fill: Callable[[Axes], None]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "loadtest", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
        fill(axes)
        axes.grid(alpha=0.25)
        for edge in ("top", "right"):
            axes.spines[edge].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _pareto(axes: Axes, cells: Sequence[Cell], style: dict[str, dict[str, str]]) -> None:
    """One line a side and kind of arrival, from light load to heavy."""
    kinds = list(dict.fromkeys(cell.arrival.kind for cell in cells))
    for side, kind in dict.fromkeys((cell.side, cell.arrival.kind) for cell in cells):
        mine = [cell for cell in cells if (cell.side, cell.arrival.kind) == (side, kind) and "per_user" in cell.metrics]
        mine.sort(key=lambda cell: cell.arrival.value)
        if not mine:
            continue
        x = [cell.metrics["per_user"].median for cell in mine]
        y = [cell.metrics["output_per_second"].median for cell in mine]
        label = side if len(kinds) == 1 else f"{side}, {kind}"
        axes.plot(x, y, label=label, linestyle="-" if kind == "closed" else ":", **_line(style[side]))
        for cell, at in zip(mine, zip(x, y, strict=True), strict=True):
            axes.annotate(str(cell.arrival), at, textcoords="offset points", xytext=(4, 4), fontsize=6, alpha=0.7)
    axes.set(xlabel="tokens/s that one user sees", ylabel="tokens/s in all", ylim=(0, None), xlim=(0, None))
    axes.legend()


def _curves(axes: Axes, runs: Sequence[Run], name: str, style: dict[str, dict[str, str]]) -> None:
    """Distributions at the heaviest load, all repeats averaged quantile by quantile."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    heaviest = max((run.arrival for run in runs), key=lambda arrival: (arrival.kind, arrival.value))
    shares = None
    for side in dict.fromkeys(run.side for run in runs):
        mine = [run for run in runs if run.side == side and run.arrival == heaviest and getattr(run.figures, name)]
        if mine:
            values = 1000 * np.mean([getattr(run.figures, name) for run in mine], axis=0)
            shares = np.linspace(0, 1, len(values))
            axes.plot(values, shares, label=side, color=style[side]["color"])
    axes.set(xlabel=f"ms, at {heaviest}", ylabel="share of requests" if name == "ttft_curve" else "share of gaps")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if shares is not None:
        axes.legend()


def _over(axes: Axes, cells: Sequence[Cell], name: str, label: str, style: dict[str, dict[str, str]]) -> None:
    unit = {"goodput": "good answers/s", "e2e_p95": "p95 of whole answers, s", "joules_per_token": "J a token"}[name]
    for side in dict.fromkeys(cell.side for cell in cells):
        have = [cell for cell in cells if cell.side == side and name in cell.metrics]
        points = [
            (cell.arrival.value, cell.metrics[name]) for cell in sorted(have, key=lambda cell: cell.arrival.value)
        ]
        if not points:
            continue
        x = [at for at, _ in points]
        middle = np.array([each.median for _, each in points])
        bounds = np.abs([[each.median - each.low, each.high - each.median] for _, each in points]).T
        axes.errorbar(x, middle, yerr=bounds, label=side, capsize=3, **_line(style[side]))
    axes.set(xlabel=label, ylabel=unit, ylim=(0, None))
    axes.legend()


def _memory(axes: Axes, report: Report) -> None:
    sides = [side for side in report.sides if side.memory.weight_bytes or side.memory.kv_bytes]
    labels = [side.label for side in sides]
    bottom = np.zeros(len(sides))
    for name, colour, field in (("weights", COLOURS[0], "weight_bytes"), ("KV cache", COLOURS[4], "kv_bytes")):
        sizes = np.array([(getattr(side.memory, field) or 0) / 1e9 for side in sides])
        axes.bar(labels, sizes, bottom=bottom, label=name, color=colour, width=0.6)
        bottom += sizes
    for i, side in enumerate(sides):
        if side.memory.kv_tokens is not None:
            axes.annotate(f"{side.memory.kv_tokens:,} tokens", (i, bottom[i]), ha="center", va="bottom", fontsize=7)
    axes.set(ylabel="GB", ylim=(0, float(bottom.max()) * 1.15))
    axes.legend()


def _line(style: dict[str, str]) -> dict[str, Any]:
    return {"color": style["color"], "marker": style["marker"], "markersize": 4, "linewidth": 1.2}
