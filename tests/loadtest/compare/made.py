"""Reports made by hand."""

from __future__ import annotations

from loadtest.compare.report import Arrival, Estimate, Memory, Quality, Report, Run, Side
from loadtest.compare.verdict import cells, verdicts, versus
from loadtest.traffic.call import Outcome
from loadtest.traffic.figures import SLO, figures
from loadtest.traffic.watch import Condition

CLOSED = Arrival("closed", 4.0)


def run(side: str, pace: float, visit: int = 0, arrival: Arrival = CLOSED, complaints: tuple[str, ...] = ()) -> Run:
    """Four requests of 11 tokens, `pace` seconds a token."""
    outcomes = []
    for i in range(4):
        first = 0.1 * i + 0.2
        arrivals = [first + pace * k for k in range(11)]
        outcomes.append(
            Outcome(
                0.1 * i, 11, 0.1 * i, arrivals, arrivals[-1], prompt_tokens=5, completion_tokens=11, answer_id=f"{i}"
            )
        )
    found = figures(outcomes, SLO())
    return Run(side, "chat", arrival, visit, "builtin", found, list(complaints), Condition(1, 2, 1, 0.1), 0.0, None)


def side(label: str, quality: Quality | None = None) -> Side:
    memory = Memory(269_000_000, 4_000_000_000, 180_000, 800_000_000)
    told = quality or Quality("16 windows", Estimate(22.5, 21.0, 24.0), Estimate(0.2, 0.19, 0.21), Estimate(0.8))
    return Side(label, "model", [], False, "0.1", "w4a16", ["qkv_proj: nvfp4 4.50 bit, cpu w4a16"], memory, told)


def report(runs: list[Run], notes: tuple[str, ...] = ()) -> Report:
    found = cells(runs)
    return Report(
        format="nvfp4-loadtest-report-1",
        made_at="2026-01-02T03:04:05Z",
        command="python -m loadtest compare",
        machine={"cpu": "2 x test"},
        seed=0,
        slo=SLO(),
        limits=[],
        sides=[side(label) for label in dict.fromkeys(each.side for each in runs)],
        runs=runs,
        cells=found,
        verdicts=verdicts(found),
        notes=list(notes),
        versus=versus(found, runs[0].side),
    )
