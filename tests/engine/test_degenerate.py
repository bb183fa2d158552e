"""Answers that go in circles are seen, others are not, and looking costs little."""

from __future__ import annotations

import random

import pytest

from nvfp4_runtime.config import SimulatedConfig
from nvfp4_runtime.engine.degenerate import is_due, repeats_itself
from tests.engine.helpers import make_engine, run_to_end, submit


@pytest.mark.parametrize("length", range(1, 9))
def test_cycles_of_up_to_eight_tokens_are_seen(length: int) -> None:
    cycle = list(range(length))
    tokens = ([50, 51, 52] + cycle * 70)[: 64 + 3 + length]
    assert repeats_itself(tokens)
    tokens[-10] = 99
    assert not repeats_itself(tokens)


def test_longer_cycles_short_answers_and_prose_are_not() -> None:
    assert not repeats_itself(list(range(9)) * 20)
    assert not repeats_itself([1] * 63)
    draw = random.Random(0)
    assert not any(repeats_itself([draw.randrange(50) for _ in range(64)]) for _ in range(200))


def test_an_answer_is_looked_at_every_32_tokens() -> None:
    assert [n for n in range(200) if is_due(n)] == [64, 96, 128, 160, 192]


@pytest.mark.parametrize(("script", "count"), [((5,), 3), ((1, 2, 3), 3), (tuple(range(90)), 0)])
def test_each_degenerate_request_is_counted_once(script: tuple[int, ...], count: int) -> None:
    engine = make_engine(simulated=SimulatedConfig(vocab_size=97, script=script), num_blocks=400)
    for i in range(3):
        engine.add(submit(f"r{i}", [i], 250))
    run_to_end(engine)
    assert engine.scheduler.stats().num_degenerate_outputs == count
