"""Timing by replayed graphs, on a made-up torch.cuda: what is called when, and how seconds per call come out."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from nvfp4_runtime.kernels.gpu_bench import timing
from nvfp4_runtime.kernels.gpu_bench.setting import Setting


class Machine:
    """Records what happens on it; a replay of the captured calls takes 2 ms each."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.capturing = False
        self.captured = 0
        self.milliseconds = 0.0

    def call(self) -> None:
        self.log.append("captured" if self.capturing else "warm")
        self.captured += self.capturing


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()

    class Stream:
        def __init__(self, device: Any) -> None: ...

        def wait_stream(self, other: Any) -> None:
            found.log.append("wait")

        def synchronize(self) -> None:
            found.log.append("synchronize")

    class Graph:
        def replay(self) -> None:
            found.log.append("replay")
            found.milliseconds += 2.0 * found.captured

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = 0.0

        def record(self) -> None:
            self.at = found.milliseconds

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    @contextlib.contextmanager
    def capture(graph: Graph, stream: Stream):
        found.capturing = True
        yield
        found.capturing = False

    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "Event": Event,
        "graph": capture,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return found


def test_calls_are_compiled_before_they_are_captured_and_only_replays_are_timed(machine):
    seconds = timing.seconds_per_call([machine.call] * 3, Setting("cuda", seconds=0.03))
    assert seconds == pytest.approx(2e-3)
    assert machine.log[:8] == ["wait", "warm", "warm", "warm", "synchronize", "captured", "captured", "captured"]
    assert set(machine.log[8:]) == {"replay"}
    assert len(machine.log[8:]) == 2 + 5  # one to warm, one to see how long it takes, and 30 ms of 6 ms each


def test_on_a_cpu_every_call_is_made_and_timed():
    made: list[int] = []
    assert timing.seconds_per_call([lambda: made.append(1)] * 2, Setting("cpu")) > 0
    assert len(made) == 4
