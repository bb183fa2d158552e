"""The device's sampler chooses what the host's chooses."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from nvfp4_runtime.sampling.draw import uniform
from nvfp4_runtime.sampling.on_device import Controls, TorchSampler, can_sample
from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.sampling.sampler import BatchSampler
from nvfp4_runtime.sampling.state import SamplingState

V = 1000


def controls_of(states: list[SamplingState]) -> Controls:
    params = [state.params for state in states]
    return Controls(
        uniform=torch.tensor([uniform(s.seed, len(s.output_token_ids)) for s in states], dtype=torch.float64),
        temperature=torch.tensor([p.temperature for p in params], dtype=torch.float64),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32),
        top_k=torch.tensor([max(p.top_k, 0) for p in params], dtype=torch.int32),
    )


def random_state(draw: random.Random, row: int) -> SamplingState:
    params = SamplingParams(
        temperature=draw.choice([0.0, 0.01, 0.5, 1.0, 2.0]),
        top_p=draw.choice([1.0, 0.95, 0.5, 1e-6]),
        top_k=draw.choice([-1, 0, 1, 7, 200, V, 5 * V]),
        min_p=draw.choice([0.0, 0.02, 0.5, 1.0]),
    )
    return SamplingState(params, draw.getrandbits(63), [1], [0] * row)


@pytest.mark.parametrize("spread", [0.5, 4.0, 30.0])
def test_the_same_tokens_as_the_hosts_sampler(spread: float) -> None:
    draw = random.Random(int(spread))
    states = [random_state(draw, row) for row in range(400)]
    # a coarse grid gives plenty of equal logits, whose order is part of the rules
    logits = (torch.randn(400, V, generator=torch.Generator().manual_seed(3)) * spread * 8).round() / 8
    logits[:50, ::3] = -torch.inf
    expected = [sampled.token_id for sampled in BatchSampler().sample(logits, states)]
    found = TorchSampler()(logits, controls_of(states)).tolist()
    assert found == expected
    assert len(set(expected)) > 20


def test_without_controls_the_first_of_the_likeliest_is_taken() -> None:
    logits = torch.zeros(3, V)
    logits[1, [30, 700]] = 2.0
    logits[2, V - 1] = 1e-3
    assert TorchSampler()(logits, None).tolist() == [0, 30, V - 1]


@pytest.mark.parametrize("controlled", [False, True])
def test_rows_that_are_not_finite_have_no_token_and_leave_others_alone(controlled: bool) -> None:
    logits = torch.zeros(5, V)
    logits[:, 17] = 3.0
    logits[1, 400] = torch.nan
    logits[2, 400] = torch.inf
    logits[3] = -torch.inf
    states = [SamplingState(SamplingParams(temperature=0.01), 1, [1], []) for _ in range(5)]
    found = TorchSampler()(logits, controls_of(states) if controlled else None)
    assert found.tolist() == [17, -1, -1, -1, 17]
    assert found.dtype == torch.int64


def test_the_drawn_frequencies_are_the_probabilities() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]])).repeat(4000, 1)
    states = [SamplingState(SamplingParams(temperature=1.0), seed, [1], []) for seed in range(4000)]
    counts = np.bincount(TorchSampler()(logits, controls_of(states)).numpy(), minlength=4) / 4000
    # four standard deviations of a share of 4000 draws are at most 4 * sqrt(0.25 / 4000) = 0.032
    assert np.abs(counts - [0.5, 0.25, 0.15, 0.1]).max() < 0.032


def test_what_the_device_cannot_do_is_told_from_what_it_can() -> None:
    def state(**params: object) -> SamplingState:
        return SamplingState(SamplingParams(**params), 0, [1], [])  # type: ignore[arg-type]  # keyword arguments of it

    assert can_sample(state(), 0)
    assert can_sample(state(temperature=0.0, prompt_logprobs=1), 0)
    for params in ({"logprobs": 0}, {"presence_penalty": 0.5}, {"repetition_penalty": 1.1}, {"logit_bias": {1: 1.0}}):
        assert not can_sample(state(**params), 0)
    assert [can_sample(state(min_tokens=2), position) for position in range(4)] == [False, False, True, True]
