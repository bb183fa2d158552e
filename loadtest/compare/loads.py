"""Which loads are measured, and the conversations of each: the same for every side, others for every pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from loadtest.compare.report import Arrival
from loadtest.traffic.call import Conversation
from loadtest.traffic.traces import read_trace, replay
from loadtest.traffic.workloads import at_instants, conversations, find_workload, poisson


@dataclass(frozen=True)
class Load:
    """A workload at an arrival. `trace`: the file that is replayed, where it is one."""

    workload: str
    arrival: Arrival
    trace: Path | None = None

    def __str__(self) -> str:
        return f"{self.workload}, {self.arrival}"


@dataclass(frozen=True)
class Sizes:
    """How much of it.

    per_user  conversations of each user in a closed loop
    seconds   of arrivals in an open one
    scale     of all lengths
    """

    per_user: int = 4
    seconds: float = 30.0
    scale: float = 1.0
    seed: int = 0


def make(load: Load, sizes: Sizes, turn: int) -> list[Conversation]:
    """The conversations of pass `turn`."""
    seed = f"{sizes.seed} {load.arrival} {turn}"
    if load.trace is not None:
        return replay(read_trace(load.trace), seed, load.arrival.value, sizes.scale, sizes.seconds)
    source = conversations(find_workload(load.workload).scaled(sizes.scale), seed)
    if load.arrival.kind == "poisson":
        return at_instants(source, poisson(load.arrival.value, sizes.seconds, seed))
    return list(islice(source, max(8, round(load.arrival.value) * sizes.per_user)))


def warm_up(count: int, seed: str) -> list[Conversation]:
    """`count` short calls, as many as will ever be sent together: first batches of a size are slow."""
    source = conversations(find_workload("8/8"), f"warm {seed}")
    return [replace(next(source), at=0.0) for _ in range(count)]


def most_users(loads: Sequence[Load]) -> int:
    closed = [round(load.arrival.value) for load in loads if load.arrival.kind == "closed"]
    return max(closed, default=8)
