"""Choosing tokens in Triton: the host sampler's choice, row by row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.triton.sampling import RowEdits, TritonSampler
from nvfp4_runtime.kernels.triton.sampling_kernels import MOST_TOKENS
from nvfp4_runtime.sampling.draw import draw, uniform
from nvfp4_runtime.sampling.logprobs import token_logprob
from nvfp4_runtime.sampling.params import SamplingParams
from tests.kernels.conftest import random_tensor


@dataclass(frozen=True)
class Drawn:
    uniform: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor


def controls(params: list[SamplingParams], device: torch.device, seed: int = 0) -> Drawn:
    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Drawn(
        column([uniform(seed, r) for r in range(len(params))], torch.float64),
        column([p.temperature for p in params], torch.float64),
        column([p.top_p for p in params], torch.float64),
        column([p.min_p for p in params], torch.float32),
        column([max(p.top_k, 0) for p in params], torch.int32),
    )


def host_choice(row: Tensor, params: SamplingParams, seed: int, at: int) -> int:
    values = row.numpy()
    if params.temperature == 0:
        return int(values.argmax())
    with np.errstate(over="ignore"):
        return draw(values, values.max(), params, uniform(seed, at))


def check(backend, logits: Tensor, params: list[SamplingParams], seed: int = 0) -> None:
    tokens, finite = TritonSampler().sample(logits.to(backend.device), controls(params, backend.device, seed))
    assert finite.all()
    expected = [host_choice(row, p, seed, r) for r, (row, p) in enumerate(zip(logits, params, strict=True))]
    assert tokens.tolist() == expected


WAYS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=1),
    SamplingParams(temperature=1.0, top_k=40, top_p=0.5),
    SamplingParams(temperature=2.0, min_p=0.1),
    SamplingParams(temperature=1.0, min_p=0.02, top_k=7, top_p=0.8),
    SamplingParams(temperature=1e-40, top_p=0.3),
]


@pytest.mark.parametrize("params", WAYS, ids=range(len(WAYS)))
@pytest.mark.parametrize("vocab", [7, 5000])
def test_it_chooses_what_the_host_chooses(triton_backend, params, vocab):
    """5000 tokens are three tiles; a spread of 3 leaves many of them possible."""
    rows = 3
    logits = random_tensor(rows, vocab, seed=vocab, dtype=torch.float32) * 3
    check(triton_backend, logits, [params] * rows, seed=11)


def test_ties_go_to_the_lower_id_wherever_they_fall(triton_backend):
    """Few distinct logits, both zeros among them: every border lies between equals."""
    logits = torch.tensor([2.0, 0.0, -0.0, 1.0])[torch.arange(2100) % 4].repeat(5, 1)
    ways = [SamplingParams(temperature=1.0, top_k=k, top_p=p) for k, p in ((5, 1.0), (600, 1.0), (0, 0.4), (0, 0.9))]
    check(triton_backend, logits, [SamplingParams(temperature=0.0), *ways], seed=3)


def test_rows_of_one_value_and_of_forbidden_tokens(triton_backend):
    logits = torch.zeros(4, 3000)
    logits[1, :2500] = -torch.inf
    logits[2] = -3e38
    logits[2, 2999] = 3e38
    logits[3, 1:] = -torch.inf
    check(triton_backend, logits, [SamplingParams(temperature=0.5, top_p=0.99)] * 4, seed=5)


def test_a_broken_row_says_so_and_does_not_touch_the_others(triton_backend):
    logits = random_tensor(6, 300, seed=1, dtype=torch.float32)
    good = logits.clone()
    logits[1, 290] = torch.nan
    logits[2, 5] = torch.inf
    logits[4] = -torch.inf
    params = [SamplingParams(temperature=1.0, top_k=50)] * 6
    for drawn in (None, controls(params, triton_backend.device)):
        tokens, finite = TritonSampler().sample(logits.to(triton_backend.device), drawn)
        assert finite.tolist() == [True, False, False, True, False, True]
        assert tokens[[1, 2, 4]].tolist() == [-1, -1, -1]
        whole, _ = TritonSampler().sample(good.to(triton_backend.device), drawn)
        assert torch.equal(tokens[[0, 3, 5]], whole[[0, 3, 5]])


def test_edits_come_before_everything_else(triton_backend):
    device = triton_backend.device
    logits = random_tensor(5, 2100, seed=2, dtype=torch.float32)
    before = logits.clone()
    bias = torch.zeros(2, 2100)
    bias[0, 2077] = 50.0
    bias[1] = -torch.inf  # nothing is left
    bits = torch.zeros(2, 66 * 32, dtype=torch.bool)
    bits[0, [31, 63, 2099]] = True  # the sign bits, and the last token
    bits[1, :2100] = True
    words = (bits.view(2, 66, 32).long() << torch.arange(32)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    edits = RowEdits(
        bias.to(device), torch.tensor([-1, 0, 1, -1, 0], dtype=torch.int32, device=device),
        words.to(device), torch.tensor([1, -1, -1, 0, 0], dtype=torch.int32, device=device),
    )  # fmt: skip
    tokens, finite = TritonSampler().sample(logits.to(device), None, edits)
    best_allowed = max((31, 63, 2099), key=lambda t: float(logits[3, t]))
    again = max((31, 63, 2099), key=lambda t: float(logits[4, t]))
    assert tokens.tolist() == [int(logits[0].argmax()), 2077, -1, best_allowed, again]
    assert finite.tolist() == [True, True, False, True, True]
    assert torch.equal(logits, before), "the raw logits are what logprobs are taken from"
    drawn = controls([SamplingParams(temperature=5.0)] * 5, device)
    tokens, _ = TritonSampler().sample(logits.to(device), drawn, edits)
    assert set(tokens[3:].tolist()) <= {31, 63, 2099}


def test_logprobs_and_ranks_are_the_host_s(triton_backend):
    logits = random_tensor(4, 2100, seed=4, dtype=torch.float32) * 4
    logits[2, 1000:1010] = logits[2].max()  # equals rank by id
    logits[3, 17] = -torch.inf
    tokens = torch.tensor([int(logits[0].argmax()), 2099, 1004, 17])
    device = triton_backend.device
    found, ranks = TritonSampler().token_logprobs(logits.to(device), tokens.to(device))
    for row, token, logprob, rank in zip(logits, tokens.tolist(), found.tolist(), ranks.tolist(), strict=True):
        expected = token_logprob(row.numpy(), token, 0)
        assert rank == expected.rank
        assert logprob == pytest.approx(expected.logprob, abs=1e-6)
    nothing, _ = TritonSampler().token_logprobs(logits[:1].to(device), torch.tensor([-1], device=device))
    assert nothing.isnan().all()


def test_draws_follow_the_distribution(triton_backend):
    """Not only the host's choices: 10 points of (0, 1) land in shares that the probabilities explain."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(10, 1)
    params = [SamplingParams(temperature=1.0)] * 10
    points = ((torch.arange(10) + 0.5) / 10).double().to(triton_backend.device)
    spread = dataclasses.replace(controls(params, triton_backend.device), uniform=points)
    tokens, _ = TritonSampler().sample(logits.to(triton_backend.device), spread)
    shares = torch.bincount(tokens.cpu(), minlength=4) / 10
    assert (shares - torch.softmax(logits[0], 0)).abs().max() <= 1 / 10 + 1e-6


def test_what_cannot_be_summed_or_matched_is_refused(triton_backend):
    sampler = TritonSampler()
    assert sampler(torch.zeros(0, 5), None).shape == (0,)
    with pytest.raises(KernelError, match="host's sampler"):
        sampler(torch.zeros(1, MOST_TOKENS + 1), None)
    with pytest.raises(KernelError, match="come together"):
        sampler(torch.zeros(1, 5), None, RowEdits(bias=torch.zeros(1, 5)))
    with pytest.raises(KernelError, match="expected"):
        sampler(torch.zeros(1, 5), None, RowEdits(allowed=torch.zeros(1, 2), allowed_row=torch.zeros(1)))
