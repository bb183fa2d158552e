"""The simulation beside the real server, under the same conversations: how far a plan may be trusted here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.compare.loads import Load, Sizes, make, most_users, warm_up
from loadtest.compare.scrape import facts
from loadtest.compare.sides import Candidate
from loadtest.neighbours import Neighbours
from loadtest.plan.calibrate import READY_SECONDS, Limits
from loadtest.plan.simulate import Machine, Simulation, WordTokens
from loadtest.server_process import nvfp4_server
from loadtest.traffic.drive import closed_loop, open_loop, run
from loadtest.traffic.figures import SLO, Figures, figures
from loadtest.traffic.wire import Endpoint

COMPARED = ("tokens/s", "e2e p95", "TTFT p95", "gap p95")


@dataclass(frozen=True)
class Comparison:
    """One load. Errors are simulated over measured, minus 1."""

    load: str
    measured: dict[str, float]
    simulated: dict[str, float]
    complaints: list[str]
    other_cores: float | None

    def error(self, name: str) -> float:
        return self.simulated[name] / self.measured[name] - 1


def compared(found: Figures) -> dict[str, float]:
    """ValueError where no request was answered whole."""
    if found.e2e is None or found.ttft is None or found.gap is None:
        raise ValueError(f"no whole answer, so nothing to compare: {found.failures}")
    latencies = (found.e2e.p95, found.ttft.p95, found.gap.p95)
    assert all(each is not None for each in latencies), "only other tools' files lack percentiles"
    return dict(zip(COMPARED, (found.output_per_second, *(each or 0.0 for each in latencies)), strict=True))


def validate(
    candidate: Candidate,
    limits: Limits,
    loads: Sequence[Load],
    sizes: Sizes,
    machine: Machine,
    tokenize: WordTokens,
    say: Callable[[str], None],
) -> list[Comparison]:
    """Each load once on the server, once simulated on one replica."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        flags = [*candidate.serve_arguments, *limits.flags, "--log-level", "warning", "--no-log-requests"]
        with nvfp4_server(flags, {}, READY_SECONDS, Path(folder) / "server.log") as server:
            endpoint = Endpoint(server.url, facts(server.url).model)
            run(closed_loop(endpoint, warm_up(most_users(loads), "validate"), most_users(loads)))
            for turn, load in enumerate(loads):
                say(f"{load}: on the server")
                found.append(_one(endpoint, load, sizes, turn, machine, tokenize))
    return found


def _one(endpoint: Endpoint, load: Load, sizes: Sizes, turn: int, machine: Machine, tokenize: WordTokens) -> Comparison:
    talks = make(load, sizes, turn)
    users = round(load.arrival.value) if load.arrival.kind == "closed" else None
    neighbours = Neighbours()
    traffic = run(open_loop(endpoint, talks) if users is None else closed_loop(endpoint, talks, users))
    others = neighbours.cores()
    result = Simulation(machine, 1, talks, tokenize, users).run()
    measured, simulated = (compared(figures(each, SLO())) for each in (traffic.outcomes, result.outcomes))
    return Comparison(str(load), measured, simulated, traffic.condition.complaints(), others)


def table(comparisons: Sequence[Comparison]) -> str:
    """Markdown: measured, simulated, and the error of each."""
    lines = [f"| load | {' | '.join(f'{name}: measured, simulated' for name in COMPARED)} |"]
    lines.append(f"| --- |{' ---: |' * len(COMPARED)}")
    for each in comparisons:
        cells = []
        for name in COMPARED:
            scale, unit = (1, "") if name == "tokens/s" else (1e3, " ms")
            pair = f"{each.measured[name] * scale:.0f}, {each.simulated[name] * scale:.0f}{unit}"
            cells.append(f"{pair} ({100 * each.error(name):+.0f} %)")
        lines.append(f"| {each.load} | {' | '.join(cells)} |")
    lines.append("")
    for name in COMPARED:
        errors = sorted(abs(each.error(name)) for each in comparisons)
        middle, most = 100 * errors[len(errors) // 2], 100 * errors[-1]
        lines.append(f"{name}: error {middle:.0f} % in the middle, {most:.0f} % at most")
    lines += [f"invalid: {each.load}: {why}" for each in comparisons for why in each.complaints]
    return "\n".join(lines)
