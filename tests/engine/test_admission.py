"""Bounds in requests and tokens, shares of tenants, and the time to come back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_runtime.engine.admission import MAX_RETRY_SECONDS, Admission, Rate
from nvfp4_runtime.errors import QueueFullError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_requests_and_tokens_are_bounded_and_given_back() -> None:
    admission = Admission(3, 100)
    for i in range(3):
        admission.admit(str(i), "", 10)
    with pytest.raises(QueueFullError, match="3 requests are running or waiting already; the bound is 3"):
        admission.check_room()
    admission.ended("0")
    admission.admit("3", "", 80)
    with pytest.raises(QueueFullError, match="3 requests"):
        admission.admit("4", "", 1)
    admission.started("3")
    assert (admission.num_requests, admission.num_queued_tokens) == (3, 20)
    admission.ended("1")
    with pytest.raises(QueueFullError, match="10 prompt tokens are waiting already; the bound is 100"):
        admission.admit("5", "", 91)
    admission.admit("5", "", 90)
    for i in ("2", "3", "5", "5", "unknown"):
        admission.ended(i)
    assert (admission.num_requests, admission.num_queued_tokens) == (0, 0)


def test_prompt_larger_than_the_token_bound_gets_in_when_nobody_waits() -> None:
    admission = Admission(10, 100)
    admission.admit("long", "", 1000)
    with pytest.raises(QueueFullError, match="1000 prompt tokens"):
        admission.admit("short", "", 1)
    admission.started("long")
    admission.admit("short", "", 1)


def test_one_key_cannot_take_every_place_and_another_finds_some() -> None:
    admission = Admission(100, 1 << 20)
    taken = 0
    with pytest.raises(QueueFullError, match="80 of them of this API key"):  # noqa: PT012 - the one that is too many
        while True:
            admission.admit(f"a{taken}", "key-0", 1)
            taken += 1
    assert taken == 80
    for i in range(16):
        admission.admit(f"b{i}", "key-1", 1)
    with pytest.raises(QueueFullError):
        admission.admit("b", "key-1", 1)
    admission.admit("c", "key-2", 1)


def test_rate_follows_what_was_and_forgets() -> None:
    clock = Clock()
    rate = Rate(clock)
    assert rate.per_second() == 0
    for _ in range(400):
        clock.now += 0.05
        rate.add(2)
    assert rate.per_second() == pytest.approx(40, rel=0.02)
    clock.now += 30
    assert rate.per_second() < 3


def test_refused_clients_are_told_to_come_back_at_the_rate_at_which_requests_end() -> None:
    clock = Clock()
    admission = Admission(10, 1 << 20, clock)
    with pytest.raises(QueueFullError) as caught:  # noqa: PT012 - the last of them
        for i in range(11):
            admission.admit(f"x{i}", "", 1)
    assert caught.value.retry_after_seconds == 1, "nothing has ended yet"
    for i in range(200):
        clock.now += 0.25
        admission.ended(f"x{i}")
        admission.admit(f"x{i + 10}", "", 1)
    waits = []
    for _ in range(8):
        with pytest.raises(QueueFullError) as caught:
            admission.check_room()
        waits.append(caught.value.retry_after_seconds)
    assert waits == pytest.approx([0.25 * (i + 1) for i in range(8)], rel=0.05)
    for _ in range(1000):
        with pytest.raises(QueueFullError) as caught:
            admission.check_room()
    assert caught.value.retry_after_seconds == MAX_RETRY_SECONDS
    clock.now += MAX_RETRY_SECONDS
    admission.ended("x205")
    admission.admit("x", "", 1)
    with pytest.raises(QueueFullError) as caught:
        admission.check_room()
    assert 0 < caught.value.retry_after_seconds <= MAX_RETRY_SECONDS


def test_idle_time_says_nothing_of_how_fast_requests_end() -> None:
    clock = Clock()
    admission = Admission(2, 1 << 20, clock)
    for i in range(3):
        admission.admit(f"alone{i}", "", 1)
        clock.now += 0.5
        admission.ended(f"alone{i}")
        clock.now += 3600
    for i in range(2):
        admission.admit(f"burst{i}", "", 1)
    with pytest.raises(QueueFullError) as caught:
        admission.check_room()
    assert caught.value.retry_after_seconds == pytest.approx(0.5, rel=0.05)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("ase"), st.integers(0, 15), st.sampled_from(["", "k"]), st.integers(1, 60))))
def test_counts_are_those_of_who_is_in(steps: list[tuple[str, int, str, int]]) -> None:
    admission = Admission(8, 100)
    inside: dict[str, int] = {}
    waits: list[float] = []
    for kind, number, tenant, tokens in steps:
        name = str(number)
        if kind == "a" and name not in inside:
            try:
                admission.admit(name, tenant, tokens)
                inside[name] = tokens
            except QueueFullError as error:
                waits.append(error.retry_after_seconds)
        elif kind == "s":
            admission.started(name)
            inside |= {name: 0} if name in inside else {}
        else:
            admission.ended(name)
            inside.pop(name, None)
        assert (admission.num_requests, admission.num_queued_tokens) == (len(inside), sum(inside.values()))
        assert admission.num_requests <= 8
        assert admission.num_queued_tokens <= 100
    assert all(0 < wait <= MAX_RETRY_SECONDS for wait in waits)
