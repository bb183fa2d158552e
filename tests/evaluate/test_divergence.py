"""KL, intervals and percentiles against definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nvfp4_runtime.evaluate.divergence import Interval, Rows, forward_kl, percentiles


def rows(logits: torch.Tensor) -> Rows:
    return Rows.of_logits(logits, [0] * len(logits))


def test_kl_is_its_definition_in_double_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(50, 1000, generator=generator) * 3 for _ in "pq")
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    # log-probabilities of order 10 in float32: 1e-6 each, weighted by probabilities that sum to 1
    assert np.abs(forward_kl(rows(p), rows(q)) - expected.numpy()).max() < 3e-6
    assert np.array_equal(forward_kl(rows(p), rows(p)), np.zeros(50))
    assert np.abs(forward_kl(rows(q), rows(p)) - expected.numpy()).max() > 0.1, "the direction matters"


def test_tokens_the_teacher_rules_out_cost_nothing_and_those_the_student_rules_out_cost_everything() -> None:
    p, q = torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[0.0, 0.0, 0.0]])
    assert forward_kl(rows(p), rows(q))[0] == pytest.approx(math.log(1.5), abs=1e-6)
    assert forward_kl(rows(p), rows(p))[0] == 0
    assert forward_kl(rows(q), rows(p))[0] == math.inf


def test_rows_hold_the_next_tokens_nll_and_the_likeliest_token() -> None:
    found = Rows.of_logits(torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]]), [0, 1])
    assert found.nll == pytest.approx([math.log(4), math.log(2)], abs=1e-6)
    assert found.top.tolist() == [1, 0]
    assert found.top_prob == pytest.approx([0.75, 0.5], abs=1e-6)


def test_interval_covers_the_mean_of_windows_and_needs_two_of_them() -> None:
    values = np.random.default_rng(1).normal(5.0, 1.0, 64 * 100)
    found = Interval.over(values, 64)
    assert found.low is not None
    assert found.high is not None
    assert found.mean == pytest.approx(values.mean())
    # independent values: a standard error of 1 / sqrt(6400), and 95 % are 1.96 of them either way
    assert found.high - found.mean == pytest.approx(1.96 / 80, rel=0.3)
    assert found.mean - found.low == pytest.approx(1.96 / 80, rel=0.3)
    assert found == Interval.over(values, 64), "the same resamples every time"
    assert Interval.over(values, 1) == Interval(float(values.mean()))


def test_interval_sees_that_positions_of_a_window_belong_together() -> None:
    windows = np.repeat(np.random.default_rng(2).normal(5.0, 1.0, 64), 100)
    found = Interval.over(windows, 64)
    assert found.high is not None
    assert found.high - found.mean == pytest.approx(1.96 / 8, rel=0.3)


def test_perplexity_is_the_exponential_of_mean_and_bounds() -> None:
    assert Interval(1.0, 0.0, 2.0).exp() == Interval(math.e, 1.0, math.exp(2))
    assert Interval(1.0).exp() == Interval(math.e)


def test_percentiles_are_named() -> None:
    found = percentiles(np.arange(1001, dtype=np.float64))
    assert found == pytest.approx({"p50": 500, "p90": 900, "p99": 990, "p99.9": 999, "max": 1000})


def test_large_vocabularies_do_not_shift_the_nll() -> None:
    logits = torch.randn(8, 50_000, generator=torch.Generator().manual_seed(0)) * 2
    exact = -logits.double().log_softmax(-1)[:, 7]
    # one rounding of a number near 12 to float32: at most 5e-7, either way; log_softmax is off by 8e-6, always one way
    assert np.abs(Rows.of_logits(logits, [7] * 8).nll - exact.numpy()).max() < 2e-6
