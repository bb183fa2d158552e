"""The order in which waiting work has its turn."""

from __future__ import annotations

import threading

import pytest

from nvfp4_runtime.engine.shortest_first import SECONDS_PER_BYTE, ShortestFirst


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Line:
    """A line whose thread is busy until `go`, so that what is submitted waits."""

    def __init__(self) -> None:
        self.clock, self.go = Clock(), threading.Event()
        self.line = ShortestFirst("test", self.clock)
        self.done: list[str] = []
        begun = threading.Event()
        self.line.submit("", 0, lambda: (begun.set(), self.go.wait(30)))
        assert begun.wait(30)

    def add(self, name: str, size_bytes: int, tenant: str = "") -> object:
        return self.line.submit(tenant, size_bytes, lambda: self.done.append(name))


def test_small_ones_go_first_and_equals_in_the_order_they_came() -> None:
    line = Line()
    futures = [line.add(name, size) for name, size in (("large", 100), ("a", 10), ("b", 10), ("tiny", 1))]
    line.go.set()
    for future in futures:
        future.result(30)  # type: ignore[attr-defined]
    assert line.done == ["tiny", "a", "b", "large"]


def test_a_large_one_has_its_turn_after_the_time_its_size_is_worth() -> None:
    line = Line()
    large = line.add("large", 1000)
    line.clock.now = 999 * SECONDS_PER_BYTE
    line.add("in time", 0)
    line.clock.now = 1001 * SECONDS_PER_BYTE
    late = line.add("too late", 0)
    line.go.set()
    late.result(30)  # type: ignore[attr-defined]
    assert large.done()  # type: ignore[attr-defined]
    assert line.done == ["in time", "large", "too late"]


def test_tenants_take_turns_whatever_each_has_waiting() -> None:
    line = Line()
    for i in range(4):
        line.add(f"flood {i}", 10, "flood")
    line.add("one", 5000, "one")
    line.add("two", 20, "two")
    last = line.add("one more", 9000, "one")
    line.go.set()
    last.result(30)  # type: ignore[attr-defined]
    assert line.done[:5] == ["flood 0", "one", "two", "flood 1", "one more"]


def test_errors_reach_who_waits_and_the_line_goes_on() -> None:
    line = Line()
    line.go.set()
    with pytest.raises(ZeroDivisionError):
        line.line.submit("", 0, lambda: 1 / 0).result(30)
    assert line.line.submit("", 0, lambda: 7).result(30) == 7


def test_what_is_cancelled_or_waits_at_the_end_is_not_done() -> None:
    line = Line()
    gone, left = line.add("gone", 0), line.add("left", 1)
    assert gone.cancel()  # type: ignore[attr-defined]
    line.line.close()
    line.go.set()
    assert left.cancelled()  # type: ignore[attr-defined]
    assert line.done == []
