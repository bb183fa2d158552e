"""A run's log as a picture: the loss of every step, and the held-out distance where it was measured."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def plot(work: Path) -> Path | None:
    """Draw log.csv and eval.csv of a run's folder as training.svg beside them; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("no plot of %s: matplotlib is not installed (pip install 'nvfp4-runtime[train]')", work)
        return None
    log, held = _read(work / "log.csv"), _read(work / "eval.csv")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(log["tokens"], log["kl"], color="#9ab", linewidth=0.8, label="KL, training rows")
    axes.plot(held["tokens"], held["kl"], color="#146", marker="o", markersize=3, label="KL, held-out rows")
    axes.set_xlabel("tokens")
    axes.set_ylabel("KL(teacher || student), nats")
    axes.set_ylim(bottom=0)
    axes.legend()
    path = work / "training.svg"
    figure.savefig(path)
    return path


def _read(path: Path) -> dict[str, list[float]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}
