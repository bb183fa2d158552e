"""BatchSampler: one token for each row of a step's logits.

A request's token depends on its own row, its parameters, its seed and how many tokens it has, never on its neighbours:
no arithmetic spans rows. What all rows need (the largest logit, which is also the finiteness check and the greedy
answer) is one call for the batch; the rest touches only the rows that asked for it, one row at a time, because a row of
49,152 floats stays in the L2 cache while a batch of 32 does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from nvfp4_runtime.sampling.draw import draw, uniform
from nvfp4_runtime.sampling.logits import FloatRow, LogitEdits
from nvfp4_runtime.sampling.logprobs import token_logprob
from nvfp4_runtime.sampling.masks import Masks, MaskWorker
from nvfp4_runtime.sampling.state import Logprob, Sampled, SamplingState
from nvfp4_runtime.structured.matcher import GrammarState

if TYPE_CHECKING:
    from torch import Tensor


class BatchSampler:
    """Chooses tokens; keeps per-request caches (token counts, bias arrays) for as long as a SamplingState lives."""

    def __init__(self) -> None:
        self._edits: WeakKeyDictionary[SamplingState, LogitEdits] = WeakKeyDictionary()
        self._masks = MaskWorker()

    def begin(self, requests: Sequence[SamplingState]) -> Masks | None:
        """Start on what `sample` will need besides the logits: the grammars' masks. None when nothing is."""
        return self._masks.start(requests)

    def sample(self, logits: Tensor, requests: Sequence[SamplingState], masks: Masks | None = None) -> list[Sampled]:
        """One answer per row.

        logits    float32 [R, V]  raw logits of each request's last token; not changed
        requests  [R]             row r belongs to requests[r]; a request has at most one row
        masks     what `begin` gave for these requests; None: begun now
        """
        assert logits.shape[0] == len(requests), (tuple(logits.shape), len(requests))
        rows = _rows(logits)
        best = rows.argmax(axis=-1)  # the first NaN, if a row has one
        largest = rows[np.arange(len(rows)), best]
        answers: list[Sampled] = []
        masks = masks or self.begin(requests)
        for row, token_id, value, state in zip(rows, best.tolist(), largest, requests, strict=True):
            if not math.isfinite(value):
                answers.append(Sampled(-1, finite=False))
                continue
            if (forced := state.forced_token) is not None:
                answers.append(_forced(row, forced, state))
                continue
            if state.grammar is not None:
                answers.append(self._sample_structured(row, token_id, state, state.grammar, masks))
                continue
            if state.edits_logits or state.awaits_min_tokens or state.params.temperature > 0:
                # a row's -Inf, and what overflows to it when divided by a small temperature, are probability 0 as meant
                with np.errstate(over="ignore"):
                    token_id = self._choose(row, token_id, value, state)
            answers.append(_answer(row, token_id, state))
        return answers

    def _sample_structured(
        self, row: FloatRow, best: int, state: SamplingState, grammar: GrammarState, masks: Masks | None
    ) -> Sampled:
        """The token of a row with a grammar, which moves on by it. Log-probabilities are those after the mask.

        best  the likeliest token without the grammar
        """
        mask = None
        if grammar.applies:
            assert masks is not None
            mask = masks.of(grammar)
        if (failure := _failure(grammar)) is not None:
            return failure
        ids = None
        if mask is not None and _only_chooses(state):  # nobody asks for the tokens that cannot come
            if state.params.temperature == 0 and mask.permits(best):
                grammar.accept(best)
                return _failure(grammar) or Sampled(best)
            ids = mask.few(len(row))
        if ids is not None:
            row = row[ids]
        elif mask is not None:
            row = mask.apply(row)
        token_id = int(row.argmax()) if len(row) else -1
        if token_id < 0 or not math.isfinite(row[token_id]):
            return Sampled(-1, finite=False, error="the grammar allows no token of this model's vocabulary")
        with np.errstate(over="ignore"):
            token_id = self._choose(row, token_id, row[token_id], state)
        if ids is not None:
            token_id = int(ids[token_id])
        if token_id < 0:
            why = "min_tokens and the lists of tokens leave no token that the grammar allows"
            return Sampled(-1, finite=False, error=why)
        grammar.accept(token_id)
        return _failure(grammar) or _answer(row, token_id, state)

    def _choose(self, row: FloatRow, token_id: int, largest: np.float32, state: SamplingState) -> int:
        """The token of a finite row whose largest logit is `token_id`'s; -1 if the edits leave none."""
        if state.edits_logits or state.awaits_min_tokens:
            edits = self._edits.get(state)
            if edits is None:
                edits = self._edits[state] = LogitEdits(state, len(row))
            row = row.copy()
            edits.apply(row, state)
            token_id = int(row.argmax())
            largest = row[token_id]
            if not math.isfinite(largest):
                return -1
        if state.params.temperature == 0:
            return token_id
        return draw(row, largest, state.params, uniform(state.seed, len(state.output_token_ids)))


def _failure(grammar: GrammarState) -> Sampled | None:
    """The answer to a request whose grammar met one of its limits."""
    if grammar.error is None:
        return None
    return Sampled(-1, finite=False, error=f"the grammar cannot go on: {grammar.error}")


def _forced(row: FloatRow, token_id: int, state: SamplingState) -> Sampled:
    """A token that comes whatever its logit is. Its log-probability is the model's own."""
    if state.grammar is not None:
        state.grammar.accept(token_id)
        if (failure := _failure(state.grammar)) is not None:
            return failure
    return _answer(row, token_id, state)


def _only_chooses(state: SamplingState) -> bool:
    """A token is wanted and nothing besides: tokens that cannot come need no place in the row."""
    return state.params.logprobs is None and not (state.edits_logits or state.awaits_min_tokens)


def prompt_logprobs(logits: Tensor, next_token_ids: Sequence[int], k: int) -> list[Logprob | None]:
    """Score a prompt: row i's log-probability of `next_token_ids[i]`, with the `k` likeliest tokens there.

    logits          float32 [T, V]  row i is the model's answer after prompt token i
    next_token_ids  [T]             prompt token i + 1
    returns         [T]             None where row i is not finite (NaN, +Inf, or all -Inf): that request has to fail
    """
    assert logits.shape[0] == len(next_token_ids), (tuple(logits.shape), len(next_token_ids))
    return [
        token_logprob(row, token_id, k) if math.isfinite(row[row.argmax()]) else None
        for row, token_id in zip(_rows(logits), next_token_ids, strict=True)
    ]


def _answer(row: FloatRow, token_id: int, state: SamplingState) -> Sampled:
    if token_id < 0:
        return Sampled(-1, finite=False)
    k = state.params.logprobs
    if k is None:
        return Sampled(token_id)
    return Sampled(token_id, token_logprob(row, token_id, k, state.params.logprob_token_ids))


def _rows(logits: Tensor) -> FloatRow:
    """The logits as numpy float32 [R, V]; no copy for a contiguous tensor in CPU memory."""
    if logits.is_cpu and logits.is_contiguous() and logits.dtype.itemsize == 4:  # what the CPU kernels give
        rows: FloatRow = logits.numpy()
        return rows
    copied: FloatRow = logits.cpu().float().contiguous().numpy()
    return copied
