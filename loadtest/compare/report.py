"""What report.json holds. The types are the schema: what does not fit them is refused when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from loadtest.traffic.figures import SLO, Figures
from loadtest.traffic.watch import Condition

Engine = Literal["builtin", "aiperf", "guidellm", "vllm"]


class Interval(msgspec.Struct, frozen=True):
    """A median over repeats, and where 95 % of its bootstrap lies."""

    median: float
    low: float
    high: float
    repeats: int


class Estimate(msgspec.Struct, frozen=True):
    """As `nvfp4 eval` gives it: a mean, and 95 % by bootstrap over windows of text."""

    mean: float
    low: float | None = None
    high: float | None = None


class Memory(msgspec.Struct, frozen=True):
    """By the server's own metrics. None: it does not say.

    kv_bytes, kv_tokens  the KV cache, and how many tokens fit into it
    rss_bytes            resident, all of the server's processes
    """

    weight_bytes: int | None = None
    kv_bytes: int | None = None
    kv_tokens: int | None = None
    rss_bytes: int | None = None


class Quality(msgspec.Struct, frozen=True):
    """`note` says why it is missing, or what it was measured on."""

    note: str
    perplexity: Estimate | None = None
    kl: Estimate | None = None
    top1: Estimate | None = None


class Side(msgspec.Struct, frozen=True):
    """One of those compared.

    flags    beside the limits that all have
    kernels  which arithmetic ran, in the server's words
    """

    label: str
    model: str
    flags: list[str]
    foreign: bool
    version: str
    numerics: str
    kernels: list[str]
    memory: Memory
    quality: Quality


class Arrival(msgspec.Struct, frozen=True):
    """closed: `value` users at once; poisson: `value` conversations a second; trace: `value` times as fast."""

    kind: Literal["closed", "poisson", "trace"]
    value: float

    def __str__(self) -> str:
        units = {"closed": "users", "poisson": "requests/s", "trace": "x speed"}
        return f"{self.value:g} {units[self.kind]}"


class Run(msgspec.Struct, frozen=True):
    """One side under one load, once.

    visit        which start of the server this was, counted over all sides in the order of time
    complaints   why the run is invalid: it takes part in no median
    other_cores  used by others meanwhile; None: not known
    joules       of the processor package or GPU; None: not readable
    condition    of the client; None: the engine does not tell
    """

    side: str
    workload: str
    arrival: Arrival
    visit: int
    engine: Engine
    figures: Figures
    complaints: list[str] = []
    condition: Condition | None = None
    other_cores: float | None = None
    joules: float | None = None

    @property
    def valid(self) -> bool:
        return not self.complaints


class Cell(msgspec.Struct, frozen=True):
    """All valid runs of one side under one load. `metrics` by the names of METRICS."""

    side: str
    workload: str
    arrival: Arrival
    metrics: dict[str, Interval]
    invalid: int = 0


class Verdict(msgspec.Struct, frozen=True):
    """Who is better in one metric under one load; winner None: nobody, and `why` tells."""

    workload: str
    arrival: Arrival
    metric: str
    winner: str | None
    why: str


class Versus(msgspec.Struct, frozen=True):
    """One side against the first, in one metric under one load.

    change  of the median, as a share of the first side's
    better  None: the intervals overlap, or repeats are too few
    """

    side: str
    baseline: str
    workload: str
    arrival: Arrival
    metric: str
    change: float
    better: bool | None


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of it. `machine`: what it ran on. `notes`: what a reader should know besides."""

    format: Literal["nvfp4-loadtest-report-1"]
    made_at: str
    command: str
    machine: dict[str, str]
    seed: int
    slo: SLO
    limits: list[str]
    sides: list[Side]
    runs: list[Run]
    cells: list[Cell]
    verdicts: list[Verdict]
    notes: list[str]
    versus: list[Versus] = []


def schema() -> dict[str, Any]:
    """JSON Schema of report.json."""
    return msgspec.json.schema(Report)


def write_report(report: Report, file: Path) -> None:
    file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def read_report(file: Path) -> Report:
    """ValueError says what of the file is not as the schema has it."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Report)
    except msgspec.DecodeError as error:
        raise ValueError(f"{file}: not a report of `python -m loadtest compare`: {error}") from error
