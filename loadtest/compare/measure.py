"""The course of a comparison: one server after the other, on one port, there and back, each load in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from loadtest.compare.aiperf import Aiperf
from loadtest.compare.loads import Load, Sizes, make, most_users, warm_up
from loadtest.compare.machine import Energy
from loadtest.compare.quality import Task, quality
from loadtest.compare.report import Arrival, Engine, Quality, Run, Side
from loadtest.compare.scrape import Facts, facts, listeners
from loadtest.compare.sides import Candidate, visits
from loadtest.neighbours import Neighbours
from loadtest.server_process import free_port, nvfp4_server
from loadtest.traffic.call import Conversation
from loadtest.traffic.drive import Traffic, closed_loop, open_loop, run
from loadtest.traffic.figures import SLO, figures
from loadtest.traffic.wire import Endpoint

READY_SECONDS = 1800.0
QUIET = ("--log-level", "warning", "--no-log-requests")
Step = Callable[[str, int, int], None]  # what is being done, calls ended, calls in all


@dataclass(frozen=True)
class Course:
    """What is to be done. `limits`: flags that every server of ours gets; `headers`: of every request."""

    candidates: Sequence[Candidate]
    loads: Sequence[Load]
    sizes: Sizes
    slo: SLO = field(default_factory=SLO)
    passes: int = 3
    limits: Sequence[str] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    engine: Engine = "builtin"
    aiperf: Aiperf | None = None
    quality: Task | None = None
    timeout_seconds: float = 600.0


def measure(course: Course, step: Step) -> tuple[list[Side], list[Run]]:
    """Everything of `course`. RuntimeError when a server does not start, or quality cannot be measured."""
    by_label = {candidate.label: candidate for candidate in course.candidates}
    port = free_port()
    qualities: dict[str, Quality] = {}
    for candidate in course.candidates:  # first, so that what fails here does not cost the measurements
        step(f"quality of {candidate.label}", 0, 0)
        qualities[candidate.label] = quality(candidate, course.quality)
    seen: dict[str, Facts] = {}
    runs: list[Run] = []
    order = visits(list(by_label), course.passes)
    for visit, label in enumerate(order):
        candidate = by_label[label]
        step(f"visit {visit + 1} of {len(order)}: starting {label}", 0, 0)
        with _reached(candidate, course, port) as url:
            found = seen[label] = facts(url, candidate.model if candidate.url else "", dict(course.headers))
            endpoint = Endpoint(url, found.model, course.headers)
            run(closed_loop(endpoint, warm_up(most := most_users(course.loads), label), most))
            turn = visit // len(by_label)
            for load in course.loads:
                what = f"visit {visit + 1} of {len(order)}: {label}, {load}"
                runs.append(_measure(course, candidate, endpoint, load, visit, turn, what, step))
            if runs[-1].valid:
                seen[label] = facts(url, found.model, dict(course.headers))  # its memory as it is after work
    return [_side(each, seen[each.label], qualities[each.label]) for each in course.candidates], runs


@contextmanager
def _reached(candidate: Candidate, course: Course, port: int) -> Iterator[str]:
    """Its URL, for as long as it is there."""
    if candidate.url is not None:
        yield candidate.url
        return
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        flags = [*candidate.serve_arguments, *course.limits, *QUIET]
        with nvfp4_server(flags, {}, READY_SECONDS, log, port) as server:
            yield server.url


def _measure(
    course: Course,
    candidate: Candidate,
    endpoint: Endpoint,
    load: Load,
    visit: int,
    turn: int,
    what: str,
    step: Step,
) -> Run:
    talks = make(load, course.sizes, turn)
    neighbours, energy = Neighbours(() if candidate.url is None else listeners(candidate.url)), Energy()
    condition, complaints = None, []
    if course.engine == "aiperf":
        assert course.aiperf is not None
        step(what, 0, sum(len(talk.calls) for talk in talks))
        outcomes = course.aiperf.run(endpoint, talks, load.arrival, course.sizes.seed)
    else:
        traffic = _drive(endpoint, load.arrival, talks, course.timeout_seconds, lambda done, of: step(what, done, of))
        outcomes, condition = traffic.outcomes, traffic.condition
        complaints = condition.complaints()
    joules, others = energy.joules(), neighbours.cores()
    found = figures(outcomes, course.slo)
    if found.whole == 0:
        complaints = [*complaints, f"no whole answer: {', '.join(found.failures)}"]
    elif found.output_tokens == 0:
        complaints = [*complaints, "no usage: the server does not count its tokens, and nobody else does"]
    if candidate.url is None and not _lives(endpoint.url):
        complaints = [*complaints, "the server died"]
    return Run(
        candidate.label, load.workload, load.arrival, visit, course.engine, found, complaints, condition,
        None if others is None else round(others, 2), joules,
    )  # fmt: skip


def _drive(
    endpoint: Endpoint,
    arrival: Arrival,
    talks: Sequence[Conversation],
    timeout_seconds: float,
    progress: Callable[[int, int], None],
) -> Traffic:
    if arrival.kind == "closed":
        return run(closed_loop(endpoint, talks, round(arrival.value), progress, timeout_seconds))
    return run(open_loop(endpoint, talks, progress, timeout_seconds))


def _lives(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/live", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def _side(candidate: Candidate, found: Facts, measured: Quality) -> Side:
    return Side(
        label=candidate.label,
        model=Path(candidate.model).name if candidate.url is None else found.model,
        flags=list(candidate.flags),
        foreign=candidate.url is not None,
        version=found.version,
        numerics=found.numerics,
        kernels=found.kernels,
        memory=found.memory,
        quality=measured,
    )
