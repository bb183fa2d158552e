"""The report as one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

import jinja2

from loadtest.compare.plots import plots
from loadtest.compare.report import Interval, Report
from loadtest.compare.table import COLUMNS, estimate, gigabytes, remarks, shown, versus_rows, within_slo

TEMPLATE = Path(__file__).with_name("page.html")


def page(report: Report) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    loads = {
        f"{cell.workload}, {cell.arrival}": [
            each for each in report.cells if (each.workload, each.arrival) == (cell.workload, cell.arrival)
        ]
        for cell in report.cells
    }
    used = [(head, name) for head, name in COLUMNS if any(name in cell.metrics for cell in report.cells)]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"Compared: {', '.join(side.label for side in report.sides)}",
        report=report,
        notes=remarks(report),
        within_slo=within_slo(report),
        versus=versus_rows(report),
        plots=plots(report),
        loads=loads.items(),
        columns=used,
        shown=shown,
        bounds=_bounds,
        estimate=estimate,
        gigabytes=gigabytes,
    )


def _bounds(value: Interval, metric: str) -> str:
    return shown(value, metric).partition(" ")[2]
