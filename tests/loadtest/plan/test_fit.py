"""Steps seen from outside, and what was put into them found again."""

from __future__ import annotations

import random

import numpy as np
import pytest

from loadtest.plan.fit import SeenStep, fit, seen_steps
from loadtest.plan.simulate import Machine, Simulation, WordTokens
from loadtest.plan.steps import Measured, MeasuredTimes
from loadtest.traffic.call import Outcome
from loadtest.traffic.workloads import Lengths, Workload, conversations

PROBED = Measured(
    "nvfp4-step-times-2", "now", {}, "model", [], 8, 1024, 16, 65536, 0.003, [(1.0, 0.005), (8.0, 0.012)],
    [(1000.0, 0.9)], 1e-6, 0.0, 20, 1.0,
)  # fmt: skip


def outcome(sent: float, arrivals: list[float], prompt: int = 10, cached: int = 0) -> Outcome:
    return Outcome(sent, len(arrivals), sent, arrivals, arrivals[-1], prompt, cached, len(arrivals))


def test_tokens_that_come_together_are_a_step():
    first = outcome(0.0, [1.0, 1.01, 1.03, 1.04])
    second = outcome(1.015, [1.0301, 1.0402, 1.05], prompt=30, cached=16)
    third = outcome(2.0, [2.1, 2.11])  # after a pause in which nobody waited
    assert seen_steps([first, second, third], 0.01, lambda step: 0.01) == [
        SeenStep(1, 0, 11, 0, pytest.approx(0.01)),
        SeenStep(1, 14, 12, 1, pytest.approx(0.02)),  # one decodes, one sends 14 tokens that are not cached
        SeenStep(2, 0, 13 + 31, 0, pytest.approx(0.01)),
        SeenStep(1, 0, 32, 0, pytest.approx(0.01)),
        SeenStep(1, 0, 11, 0, pytest.approx(0.01)),
    ]


@pytest.mark.parametrize("late", [0.004, 0.007])
def test_tokens_that_come_late_belong_to_the_step_that_could_have_made_them(late):
    """The second one's come after the first one's, beyond TOGETHER of the shortest step; its own would take 10 ms."""
    pair = [outcome(0.0, [1.0, 1.02, 1.04]), outcome(0.001, [1.0 + late, 1.02 + late, 1.04 + late])]
    apart = seen_steps(pair, 0.005, lambda step: 0.0)
    assert [step.rows for step in apart] == [0, 1, 1, 1, 1]
    together = seen_steps(pair, 0.005, lambda step: 0.01)
    assert [(step.rows, step.context) for step in together] == [(2, 22), (2, 24)]
    assert [step.seconds for step in together] == pytest.approx([0.02, 0.02])


def test_a_request_that_overtakes_itself_is_two_steps():
    """Two tokens of one request are of two steps, however close."""
    (step,) = seen_steps([outcome(0.0, [1.0, 1.001])], 0.01, lambda step: 0.01)
    assert (step.rows, step.seconds) == (1, pytest.approx(0.001))


@pytest.mark.parametrize("late", [0.0, 0.05])
def test_factors_and_scatter_that_were_put_in_are_found(late):
    """A simulated load whose steps cost 1.2 times the probed ones, prompts 0.9 times, 4 ms for a newcomer."""
    times = MeasuredTimes(PROBED)
    draw = random.Random("noise")

    class Real:
        source, newcomer_seconds = "made up", 0.004

        def seconds(self, schedule):
            rows = sum(entry.count == 1 for entry in schedule.entries)
            context = sum(entry.stop for entry in schedule.entries if entry.count == 1)
            decode, prefill = times.parts(rows, sum(e.count for e in schedule.entries if e.count > 1), context)
            mean = 1.2 * decode + 0.9 * prefill
            return mean * (draw.uniform(0.95, 1.05) + (2.0 if draw.random() < late else 0.0))

    machine = Machine(Real(), 8, 1024, 16, 65536, 4096, 0.003)
    source = conversations(Workload("mixed", Lengths(96, 0.7), Lengths(40, 0.6)), "fit")
    steps = []
    for users in (1, 3, 8):
        outcomes = Simulation(machine, 1, [next(source) for _ in range(8 * users)], WordTokens(), users).run().outcomes
        steps += seen_steps(outcomes, 0.005, lambda step: sum(times.parts(step.rows, step.prompt, step.context)))
    parts = np.array([times.parts(step.rows, step.prompt, step.context) for step in steps])
    found = fit(steps, parts[:, 0], parts[:, 1])
    mean = 1 + 2.0 * late  # what late steps add to the mean is kept in the factors
    # steps scatter evenly by 5 %, so 2.9 % each; there are some 40 with a newcomer and 90 with prompts, and late ones
    # make the mean uncertain by 2 sqrt(late / steps with most of the time)
    slack = 0.03 + 0.6 * late
    assert found.decode == pytest.approx(1.2 * mean, rel=slack)
    assert found.prefill == pytest.approx(0.9 * mean, rel=slack)
    assert found.newcomer_seconds == pytest.approx(0.004 * mean, abs=0.001)
    assert np.mean(found.scatter) == pytest.approx(1, abs=1e-4)
    assert np.percentile(found.scatter, 97) > (2 if late else 1.03)
    assert np.percentile(found.scatter, 50) == pytest.approx(1 / mean, rel=0.03)


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="5 steps were seen"):
        fit([SeenStep(1, 0, 10, 0, 0.01)] * 5, np.ones(5), np.zeros(5))
    with pytest.raises(ValueError, match="0 steps with prompts"):
        fit([SeenStep(1, 0, 10, 0, 0.01)] * 500, np.ones(500), np.zeros(500))
