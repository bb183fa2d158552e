"""Edits of one row of logits before temperature: allowed tokens, bad words, logit_bias, min_tokens, penalties.

Order, as vLLM has it: allowed tokens, bad words, logit_bias, min_tokens, repetition penalty, frequency and presence
penalty. Rows are float32 numpy, [V]. All but the list of allowed tokens touch only the tokens concerned, so that a step
costs the number of distinct tokens, never V.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nvfp4_runtime.sampling.state import SamplingState

FloatRow = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int64]

_BLOCK = 128
_FLOAT32_MAX = np.finfo(np.float32).max


class TokenCounts:
    """Distinct tokens of a request and how often each was generated; grows with the request.

    ids      int64   [n]   distinct tokens of prompt and output
    counts   float32 [n]   occurrences in the output alone; 0 for a token only the prompt has
    """

    def __init__(self, prompt_token_ids: npt.ArrayLike) -> None:
        self._ids: TokenIds = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._slots = {token_id: slot for slot, token_id in enumerate(self._ids.tolist())}
        self._num_outputs = 0

    def catch_up(self, state: SamplingState) -> None:
        """Count the outputs that arrived since the last call."""
        outputs = state.output_token_ids
        assert len(outputs) >= self._num_outputs, "outputs were taken back: make a new SamplingState"
        for i in range(self._num_outputs, len(outputs)):
            slot = self._slots.setdefault(outputs[i], len(self._slots))
            if slot == len(self._ids):
                self._grow()
            self._ids[slot] = outputs[i]
            self._counts[slot] += 1
        self._num_outputs = len(outputs)

    def _grow(self) -> None:
        more = max(16, len(self._ids))
        self._ids = np.concatenate([self._ids, np.zeros(more, dtype=np.int64)])
        self._counts = np.concatenate([self._counts, np.zeros(more, dtype=np.float32)])

    @property
    def ids(self) -> TokenIds:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> FloatRow:
        return self._counts[: len(self._slots)]


class LogitEdits:
    """One request's edits, with its arrays prepared once."""

    def __init__(self, state: SamplingState, vocab_size: int) -> None:
        params = state.params
        self._bias_ids = np.fromiter(params.logit_bias.keys(), dtype=np.int64, count=len(params.logit_bias))
        self._bias = np.fromiter(params.logit_bias.values(), dtype=np.float32, count=len(params.logit_bias))
        # A generation_config may list an EOS id that the model's vocabulary lacks: nothing to forbid there.
        stops = {t for t in (*state.eos_token_ids, *params.stop_token_ids) if t < vocab_size}
        self._stop_ids = np.fromiter(sorted(stops), dtype=np.int64, count=len(stops))
        self._counts = TokenCounts(state.prompt_token_ids) if state.penalises else None
        self._forbidden: npt.NDArray[np.bool_] | None = None  # [V], where only some tokens are allowed
        if params.allowed_token_ids is not None:
            self._forbidden = np.ones(vocab_size, dtype=np.bool_)
            self._forbidden[list(params.allowed_token_ids)] = False

    def apply(self, row: FloatRow, state: SamplingState) -> None:
        """Edit `row` in place for the token that comes next."""
        if self._forbidden is not None:
            row[self._forbidden] = -np.inf
        if state.params.bad_words_token_ids:
            row[state.completing_bad_words] = -np.inf
        row[self._bias_ids] += self._bias
        if state.awaits_min_tokens:
            row[self._stop_ids] = -np.inf
        if self._counts is not None:
            self._counts.catch_up(state)
            _penalise(row, self._counts, state)


def _penalise(row: FloatRow, tokens: TokenCounts, state: SamplingState) -> None:
    params = state.params
    values = row[tokens.ids]
    if params.repetition_penalty != 1:
        penalty = np.float32(params.repetition_penalty)
        # A penalty near 0 overflows; +Inf would read as a broken model, so such logits stop at the largest float.
        with np.errstate(over="ignore"):
            values = np.minimum(np.where(values > 0, values / penalty, values * penalty), _FLOAT32_MAX)
    values -= np.float32(params.frequency_penalty) * tokens.counts
    values -= np.float32(params.presence_penalty) * (tokens.counts > 0)
    row[tokens.ids] = values


def contenders(row: FloatRow, k: int) -> TokenIds:
    """Ids, ascending, of every token that can be among the `k` largest, equals of the k-th included; few more than k.

    The k largest of the block maxima are k tokens of the row, so the k-th largest token is at least the smallest of
    them. For V = 49,152 and small k that takes 40 us, a selection over the whole row 300 us.
    """
    num_blocks = len(row) // _BLOCK
    if k < num_blocks:
        maxima = row[: num_blocks * _BLOCK].reshape(num_blocks, _BLOCK).max(axis=1)
        threshold = np.partition(maxima, num_blocks - k)[num_blocks - k]
    else:
        threshold = np.partition(row, len(row) - k)[len(row) - k]
    return np.flatnonzero(row >= threshold)
