"""Arithmetic of an evaluation: log-probabilities, KL divergence per position, means with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PERCENTILES = (50.0, 90.0, 99.0, 99.9, 100.0)
RESAMPLES = 10_000


@dataclass(frozen=True)
class Rows:
    """One model's answers after R tokens.

    log_probs      float32 [R, V]
    nll            [R]             -log p(the token that follows), nats
    top, top_prob  [R]             the likeliest token (the lower id where two are equal) and its probability
    """

    log_probs: Tensor
    nll: Floats
    top: Ints
    top_prob: Floats

    @classmethod
    def of_logits(cls, logits: Tensor, targets: Sequence[int]) -> Rows:
        """From float32 logits [R, V]. log_softmax sums in float32, which moves every NLL of 49,152 tokens by 8e-6."""
        largest, top = logits.max(-1, keepdim=True)
        log_probs = logits - largest
        log_total = log_probs.exp().sum(-1, keepdim=True, dtype=torch.float64).log()
        log_probs -= log_total.float()
        return cls._of(log_probs, targets, top, -log_total)

    @classmethod
    def of_log_probs(cls, log_probs: Tensor, targets: Sequence[int]) -> Rows:
        best, top = log_probs.max(-1, keepdim=True)
        return cls._of(log_probs, targets, top, best.double())

    @classmethod
    def _of(cls, log_probs: Tensor, targets: Sequence[int], top: Tensor, best: Tensor) -> Rows:
        nll = -log_probs.gather(1, torch.tensor(targets).unsqueeze(1)).squeeze(1).double()
        return cls(log_probs, nll.numpy(), top.squeeze(1).numpy(), best.float().double().exp().squeeze(1).numpy())

    @cached_property
    def probs(self) -> Tensor:
        """float32 [R, V]; made once, for a teacher of many students."""
        return self.log_probs.exp()

    @cached_property
    def rules_out(self) -> bool:
        """Whether some token has probability 0."""
        return not math.isfinite(float(self.log_probs.amin()))


def forward_kl(teacher: Rows, student: Rows) -> Floats:
    """KL(teacher || student) in nats over the whole vocabulary, per row.

    Terms in float32, summed in float64: off by about 1e-6 of the log-probabilities' size. Equal bits give exactly 0.
    """
    terms = teacher.log_probs - student.log_probs
    if teacher.rules_out:  # where the teacher's probability is 0 the term is 0, whatever the student's
        terms.masked_fill_(teacher.log_probs == -math.inf, 0.0)
    kl: Floats = terms.mul_(teacher.probs).sum(-1, dtype=torch.float64).numpy()
    return kl


class Interval(msgspec.Struct):
    """A mean over positions and its 95 % interval: whole windows resampled with replacement, 10,000 times, seeded.

    None with a single window, from which nothing can be said about others.
    """

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def over(cls, values: Floats, num_windows: int) -> Interval:
        """values [num_windows * size], window after window."""
        mean = float(values.mean())
        if num_windows < 2:
            return cls(mean)
        each = values.reshape(num_windows, -1).mean(axis=1)
        chosen = np.random.default_rng(0).integers(0, num_windows, (RESAMPLES, num_windows))
        low, high = np.quantile(each[chosen].mean(axis=1), [0.025, 0.975])
        return cls(mean, float(low), float(high))

    def exp(self) -> Interval:
        """Of a mean NLL: the perplexity."""
        return Interval(
            math.exp(self.mean),
            None if self.low is None else math.exp(self.low),
            None if self.high is None else math.exp(self.high),
        )


def percentiles(values: Floats) -> dict[str, float]:
    """The 50th, 90th, 99th, 99.9th percentile, and the maximum."""
    found = np.quantile(values, [p / 100 for p in PERCENTILES])
    names = [f"p{p:g}" for p in PERCENTILES[:-1]] + ["max"]
    return dict(zip(names, map(float, found), strict=True))
