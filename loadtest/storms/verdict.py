"""What a storm found: promises kept or not, each with its numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Promise:
    """`found` beside the `bound` that it had to keep to."""

    name: str
    kept: bool
    found: float
    bound: str


@dataclass
class Verdict:
    """figures      what was measured beside the promises
    busy_cores   mean cores that others used meanwhile; None where that cannot be told
    """

    storm: str
    promises: list[Promise] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    busy_cores: float | None = None

    def at_most(self, name: str, found: float, bound: float) -> None:
        self.promises.append(Promise(name, found <= bound, round(found, 4), f"<= {bound:g}"))

    def at_least(self, name: str, found: float, bound: float) -> None:
        self.promises.append(Promise(name, found >= bound, round(found, 4), f">= {bound:g}"))

    def equal(self, name: str, found: float, bound: float) -> None:
        self.promises.append(Promise(name, found == bound, round(found, 4), f"= {bound:g}"))

    @property
    def kept(self) -> bool:
        return bool(self.promises) and all(promise.kept for promise in self.promises)

    @property
    def broken(self) -> list[Promise]:
        return [promise for promise in self.promises if not promise.kept]

    def text(self) -> str:
        lines = [f"{self.storm}: {'kept' if self.kept else 'BROKEN'} ({self.seconds:.0f} s)"]
        lines += [f"  {'ok    ' if p.kept else 'BROKEN'} {p.name}: {p.found:g} ({p.bound})" for p in self.promises]
        lines += [f"  {name}: {value}" for name, value in self.figures.items()]
        if self.busy_cores is not None:
            lines.append(f"  cores used by others meanwhile: {self.busy_cores:.1f}")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"kept": self.kept} | asdict(self), indent=1) + "\n")


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the others are not above; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares, y per x; 0 where x does not vary."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
