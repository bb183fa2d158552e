"""Log-probabilities of one row of raw logits: of a given token and of the likeliest ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nvfp4_runtime.sampling.logits import FloatRow, contenders
from nvfp4_runtime.sampling.state import Logprob


def token_logprob(row: FloatRow, token_id: int, k: int, others: Sequence[int] | None = None) -> Logprob:
    """`token_id`'s log-probability and rank in `row`, with the `k` likeliest tokens, or with `others` in their place.

    row  float32 [V]  raw logits with a finite maximum, no NaN
    """
    largest = row.max()
    with np.errstate(over="ignore"):  # a difference of huge logits is -Inf: probability 0, as meant
        log_total = math.log(float(np.exp(row - largest).sum(dtype=np.float64)))
    value = row[token_id]
    rank = 1 + np.count_nonzero(row > value) + np.count_nonzero(row[:token_id] == value)

    def logprob(x: np.float32) -> float:
        return float(x) - float(largest) - log_total  # in this order: huge logits would swallow log_total

    top = [(t, logprob(row[t])) for t in (likeliest(row, k) if others is None else others)]
    return Logprob(token_id, logprob(value), int(rank), top)


def likeliest(row: FloatRow, k: int) -> list[int]:
    """Ids of the `k` largest logits, best first; equal logits by lower id first. All of them when k >= V."""
    k = min(k, len(row))
    if k == 0:
        return []
    ids = contenders(row, k)  # ascending, which the stable sort keeps among equals
    best: list[int] = ids[np.argsort(-row[ids], kind="stable")[:k]].tolist()
    return best
