"""The simulation beside the real server, under the same conversations: how far a plan may be trusted here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

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
    passes: int = 1,
) -> list[Comparison]:
    """Each load on the server and simulated on one replica, once in each pass, there and back; medians of passes."""
    found: dict[int, list[Comparison]] = {}
    with tempfile.TemporaryDirectory() as folder:
        flags = [*candidate.serve_arguments, *limits.flags, "--log-level", "warning", "--no-log-requests"]
        with nvfp4_server(flags, {}, READY_SECONDS, Path(folder) / "server.log") as server:
            endpoint = Endpoint(server.url, facts(server.url).model)
            run(closed_loop(endpoint, warm_up(most_users(loads), "validate"), most_users(loads)))
            for number in range(passes):
                for i in range(len(loads))[:: 1 if number % 2 == 0 else -1]:
                    say(f"pass {number + 1} of {passes}, {loads[i]}: on the server")
                    turn = number * len(loads) + i
                    found.setdefault(i, []).append(_one(endpoint, loads[i], sizes, turn, machine, tokenize))
    return [together(each) for _, each in sorted(found.items())]


def together(passes: Sequence[Comparison]) -> Comparison:
    """Medians of one load's passes; complaints of all, and the most that others used in any."""
    cores = [each.other_cores for each in passes if each.other_cores is not None]
    return Comparison(
        passes[0].load,
        {name: median(each.measured[name] for each in passes) for name in COMPARED},
        {name: median(each.simulated[name] for each in passes) for name in COMPARED},
        [why for each in passes for why in each.complaints],
        max(cores, default=None),
    )


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
